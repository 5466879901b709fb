"""In-place distillation: the smaller sizes learn from the largest, which learns nothing back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import checkpoint as checkpoints

from matryoshkafy.kernels.cross_entropy import BUDGET
from matryoshkafy.losses.fused import LossError
from matryoshkafy.outputs import Readout, running


@dataclass(frozen=True)
class Distillation:
    """How much, at which temperature, and by which divergence the largest size teaches the others.

    Args:
        weight: of the divergence of each smaller size.
        temperature: of "kl".
        kind: "kl": temperature**2 KL(teacher || student) of softmax(outputs / temperature), mean
            over rows (Hinton et al. 2015); "mse": mean squared difference of the outputs; "cosine":
            1 - cosine of the angle between the outputs; "similarity": mean squared difference of
            the cosine similarities between the rows of a batch, for embeddings, whose widths differ
            (Park et al. 2019).
    """

    weight: float = 1.0
    temperature: float = 1.0
    kind: str = "kl"

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.temperature <= 0:
            raise LossError(
                f"Distillation(temperature={self.temperature}, kind={self.kind!r}): the "
                f"temperature should be positive and the kind one of {', '.join(KINDS)}"
            )


@dataclass(frozen=True)
class _Kind:
    """What is made of the teacher's outputs once, and a student's divergence per row [N]."""

    lesson: Callable[[Tensor, float], Any]
    divergence: Callable[[Tensor, Any, float], Tensor]


def log_chances(outputs: Tensor, temperature: float) -> Tensor:
    """log softmax(outputs / temperature), at least in float32 whatever autocast prefers."""
    warm = outputs if temperature == 1 else outputs / temperature
    return torch.log_softmax(warm, -1, dtype=torch.promote_types(outputs.dtype, torch.float32))


def chances(outputs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """softmax(outputs / temperature) [N, V], and its entropy [N] with the sign of a KL's term."""
    log_p = log_chances(outputs, temperature)
    p = log_p.exp()
    return p, (p * log_p).sum(-1)


def kl(student: Tensor, lesson: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """Per row [N]: what the student's cross entropy with the teacher has above its entropy."""
    p, negentropy = lesson
    return (negentropy - (p * log_chances(student, temperature)).sum(-1)) * temperature**2


def mse(student: Tensor, lesson: Tensor, _: float) -> Tensor:
    """Per row [N]."""
    return (student - lesson).square().mean(-1)


def cosine(student: Tensor, lesson: Tensor, _: float) -> Tensor:
    """Per row [N]: 1 - the cosine of the angle to the teacher's row."""
    return 1 - F.cosine_similarity(student, lesson, dim=-1)


def cosines(outputs: Tensor, _: float) -> Tensor:
    """Of each row with each [N, N], at least in float32 whatever autocast prefers.

    Rows that are nearly alike differ in what bfloat16 rounds off.
    """
    rows = F.normalize(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim=-1)
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.t()


def _similarity(student: Tensor, lesson: Tensor, temperature: float) -> Tensor:
    """Per row [N]."""
    return (cosines(student, temperature) - lesson).square().mean(-1)


KINDS = {
    "kl": _Kind(chances, kl),
    "mse": _Kind(lambda outputs, _: outputs, mse),
    "cosine": _Kind(lambda outputs, _: outputs, cosine),
    "similarity": _Kind(cosines, _similarity),
}


def check_shapes(outputs: Mapping[int, Tensor], kind: str) -> None:
    """Raises LossError if the kind compares outputs of different shapes."""
    shapes = {tuple(out.shape) for out in outputs.values()}
    if kind != "similarity" and len(shapes) > 1:
        raise LossError(
            f"distillation {kind!r} compares outputs of one shape, but these are {sorted(shapes)}; "
            "use Distillation(kind='similarity') for embeddings"
        )


def divergences(
    outputs: Mapping[int, Tensor], config: Distillation, real: Tensor | None
) -> dict[int, Tensor]:
    """The divergence of each size but the largest, mean over the real rows (all if None)."""
    check_shapes(outputs, config.kind)
    flat = {
        size: out.reshape(-1, out.shape[-1]) if real is None else out[real]
        for size, out in outputs.items()
    }
    kind, temperature = KINDS[config.kind], config.temperature
    lesson = kind.lesson(flat.pop(max(flat)).detach(), temperature)
    return {m: kind.divergence(out, lesson, temperature).mean() for m, out in flat.items()}


def readout_divergences(
    readout: Readout,
    sizes: Sequence[int],
    config: Distillation,
    real: Tensor | None,
    scales: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """The same from a readout: the logits are made in chunks of rows, again in the backward.

    scales {size: factor of its logits}, or nothing.
    """
    hidden = readout.scaled
    hidden = hidden.reshape(-1, hidden.shape[-1]) if real is None else hidden[real]
    widths = [readout.widths[size] for size in sorted(sizes)]
    cells = BUDGET["cpu"] // (4 * max(len(readout.table), 1) * 3 * len(widths))
    factors = [scales[size] for size in sorted(sizes)] if scales else [None] * len(widths)
    fixed = (readout.table, readout.bias, list(zip(widths, factors, strict=True)), config)
    again = cast("Callable[..., Tensor]", checkpoints.checkpoint)  # pyright: ignore[reportUnknownMemberType]
    sums = [
        again(chunk_sums, part, *fixed, use_reentrant=False, preserve_rng_state=False)
        for part in torch.split(hidden, max(cells, 16))
    ]
    means = torch.stack(sums).sum(0) / len(hidden)
    return dict(zip(sorted(sizes)[:-1], means, strict=True))


def chunk_sums(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor | None,
    levels: Sequence[tuple[int, Tensor | None]],
    config: Distillation,
) -> Tensor:
    """The summed divergence of each level (width, factor) but the last, for some rows."""
    kind = KINDS[config.kind]
    sums: list[Tensor] = []
    last, factor = levels[-1]
    with torch.no_grad():
        teacher = F.linear(hidden[:, :last], table[:, :last], bias)
        lesson = kind.lesson(scaled(teacher, factor), config.temperature)
    smaller = levels[:-1]
    every = running(hidden, table, [width for width, _ in smaller], bias)
    for logits, (_, factor) in zip(every, smaller, strict=True):
        student = scaled(logits, factor)
        sums.append(kind.divergence(student, lesson, config.temperature).sum())
    return torch.stack(sums)


def scaled(logits: Tensor, factor: Tensor | None) -> Tensor:
    """The logits, without a pass over them where there is no factor."""
    return logits if factor is None else logits * factor
