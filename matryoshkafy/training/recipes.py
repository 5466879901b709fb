"""What a distillation learns, and how: terms and recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from matryoshkafy.dolls.measure import floats_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.losses.distillation import KINDS
from matryoshkafy.training.rota import ROTAS

Pick = Callable[[Any, Any], Tensor]
PROJECTED = ("mse", "cosine")


class DistilError(MatryoshkafyError):
    """A recipe that does not fit the doll, the teacher or the data."""


def first_tensor(output: object, batch: object) -> Tensor:
    """Return the first floating tensor of an output: the embedding, or the logits."""
    del batch
    return next(floats_of(output))


@dataclass(frozen=True)
class Term:
    """One thing that a size learns from the teacher.

    Attributes:
        kind: "similarity" (squared difference of the cosines between the rows of a batch; widths
            may differ), "cosine" (1 - cosine), "mse", or "kl" (of softmax(outputs / temperature)).
            Where widths differ, mse and cosine learn a projection to the teacher's width for each
            size, which is thrown away.
        weight: its factor in the loss.
        temperature: of kl.
        of: (output, batch) -> the tensor [..., width] of a size that is compared; a layer of
            `hidden_states`, or the logits of real positions, are picked here.
        of_teacher: the same of the teacher's output; None: as `of`.
    """

    kind: str = "similarity"
    weight: float = 1.0
    temperature: float = 1.0
    of: Pick = first_tensor
    of_teacher: Pick | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.temperature <= 0:
            raise DistilError(
                f"Term(kind={self.kind!r}, temperature={self.temperature}): expected one of "
                f"{', '.join(KINDS)} and a positive temperature"
            )


@dataclass(frozen=True)
class Recipe:
    """How a doll is distilled.

    Attributes:
        steps: optimizer steps of the whole run.
        batch: rows of a step.
        rate: peak learning rate of AdamW, then down a half cosine to a tenth.
        warmup: the part of the steps over which the rate rises to its peak.
        decay: weight decay of matrices.
        clip: largest norm of the gradient.
        terms: what is learnt.
        sizes: which sizes learn at a step: "rows" (every row of the batch is given one size; one
            pass per size over its rows, so a step costs about one full pass), "one" (one size),
            "sandwich" (largest, smallest and one between), "all". A term that compares rows with
            each other (similarity) sees few pairs in the rows of a size: "rows" is ahead in some
            hundred steps, "one" in thousands.
        weights: {size: weight} of the losses ("sandwich", "all") or chances ("rows", "one").
        widen: the part of the run over which the smaller sizes join, the largest first.
        last: the part of the run, at its end, in which the largest size alone learns.
        precision: "float32" or "bfloat16" (autocast).
        seed: of the order of the rows and of the sizes.
        save: steps between two saves.
        replay: on a CUDA device, record a step once for each shape of its batch and replay it
            (`Replayed`); let `collate` pad to few lengths.
    """

    steps: int = 300
    batch: int = 64
    rate: float = 2e-4
    warmup: float = 0.1
    decay: float = 0.01
    clip: float = 1.0
    terms: tuple[Term, ...] = (Term(),)
    sizes: str = "rows"
    weights: Mapping[int, float] = field(default_factory=dict[int, float])
    widen: float = 0.0
    last: float = 0.0
    precision: str = "float32"
    seed: int = 0
    save: int = 100
    replay: bool = False

    def __post_init__(self) -> None:
        if self.sizes not in ROTAS or self.precision not in ("float32", "bfloat16"):
            raise DistilError(
                f"Recipe(sizes={self.sizes!r}, precision={self.precision!r}): expected sizes one "
                f"of {', '.join(ROTAS)}, precision float32 or bfloat16"
            )
        if self.steps < 0 or self.batch < 1 or not self.terms:
            raise DistilError(
                f"Recipe(steps={self.steps}, batch={self.batch}, {len(self.terms)} terms): "
                "expected steps of at least 0, a batch of at least 1 and at least one term"
            )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * progress))
