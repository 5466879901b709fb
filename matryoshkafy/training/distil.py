"""distil(): every size of a doll learns from a frozen teacher; a run resumes to the bit."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.batches import arguments_of
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.losses.distillation import KINDS
from matryoshkafy.training.resuming import batches, resume_run, save_run
from matryoshkafy.training.rota import ROTAS, Rota, Share
from matryoshkafy.training.watching import RunLog

Pick = Callable[[Any, Any], Tensor]
PROJECTED = ("mse", "cosine")


class DistilError(MatryoshkafyError):
    """A recipe that does not fit the doll, the teacher or the data."""


def first_tensor(output: object, batch: object) -> Tensor:
    """Return the first floating tensor of an output: the embedding, or the logits."""
    del batch
    found = (v for v in pytree.tree_leaves(output) if isinstance(v, Tensor))
    return next(v for v in found if v.is_floating_point())


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
            "sandwich" (largest, smallest and one between), "all".
        weights: {size: weight} of the losses ("sandwich", "all") or chances ("rows", "one").
        widen: the part of the run over which the smaller sizes join, the largest first.
        last: the part of the run, at its end, in which the largest size alone learns.
        precision: "float32" or "bfloat16" (autocast).
        seed: of the order of the rows and of the sizes.
        save: steps between two saves.
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


@dataclass(frozen=True)
class DistilReport:
    """Steps done in all, and per size the mean loss over its first and its last ten steps."""

    steps: int
    first: Mapping[int, float]
    last: Mapping[int, float]

    def __str__(self) -> str:
        rows = [f"{m:>6}  {self.first[m]:9.5f}  {self.last[m]:9.5f}" for m in self.last]
        return "\n".join([f"{self.steps} steps", f"{'size':>6}  {'first':>9}  {'last':>9}", *rows])


def distil(
    doll: Doll,
    teacher: nn.Module | Tensor | None,
    data: Sequence[object],
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    *,
    collate: Callable[[list[Any]], object] = torch.stack,
    folder: str | os.PathLike[str] | None = None,
) -> DistilReport:
    """Train every size of a doll on a frozen teacher's outputs, in place.

    Order or rotate the doll first: a pretrained model's units have no order, and a start from
    unordered ones costs a multiple of the steps. Dropout and batch norm follow the doll's mode:
    call `doll.eval()` to distil without dropout.

    Args:
        doll: the student; its largest size learns from the teacher too, which anchors it.
        teacher: a module that takes what the doll takes; or its outputs for all rows, [rows, ...],
            computed once; or None for a frozen copy of the doll's full model as it is now.
        data: the rows, by index.
        recipe: steps, terms, sizes.
        collate: rows -> a batch as `order` takes it (a tensor, a tuple, a mapping of keywords).
        folder: where the run is saved; a run that is found there goes on where it was saved. The
            copy of teacher=None is then the doll as it comes in, so bring the same one again.

    Returns:
        The losses per size of the steps done in this call.

    Raises:
        DistilError: rows, teacher or recipe do not fit.
    """
    if isinstance(teacher, Tensor) and len(teacher) != len(data):
        raise DistilError(
            f"the teacher's outputs have {len(teacher)} rows, the data {len(data)}; give one "
            "output for each row, in the same order"
        )
    if len(data) < recipe.batch:
        raise DistilError(f"{len(data)} rows do not fill a batch of {recipe.batch}; give more rows")
    run = _Run(doll, _frozen(doll, teacher), data, recipe, collate)
    return run.carried_out(folder)


def _frozen(doll: Doll, teacher: nn.Module | Tensor | None) -> nn.Module | Tensor:
    if teacher is None:
        return copy.deepcopy(doll).eval().requires_grad_(False)
    if isinstance(teacher, nn.Module):
        own = {id(p) for p in doll.parameters()}
        if any(id(p) in own for p in teacher.parameters()):
            raise DistilError(
                "the teacher's parameters are the doll's own, so it would change as the doll "
                "learns; give a deep copy of the model, made before, or teacher=None"
            )
        return teacher.eval()
    return teacher


class _Run:
    """The parts of one distillation; everything random follows from the seed and the step."""

    def __init__(
        self,
        doll: Doll,
        teacher: nn.Module | Tensor,
        data: Sequence[object],
        recipe: Recipe,
        collate: Callable[[list[Any]], object],
    ) -> None:
        self.doll, self.teacher, self.data, self.recipe = doll, teacher, data, recipe
        self.collate = collate
        self.device = next(doll.parameters()).device.type
        self.rota = Rota(tuple(doll.sizes), recipe.sizes, recipe.weights, recipe.widen, recipe.last)
        self.projections = self._made_projections()
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=recipe.rate)

    def carried_out(self, folder: str | os.PathLike[str] | None) -> DistilReport:
        """Do the steps that are left."""
        recipe = self.recipe
        losses: dict[int, list[float]] = {m: [] for m in self.doll.sizes}
        parts = {"model": self.doll, "projections": self.projections, "optimizer": self.optimizer}
        position = None if folder is None else resume_run(folder, parts)
        start = 0 if position is None else position["step"]
        with RunLog(recipe.steps, start=start, console=Console(stderr=True)) as log:
            for step, rows in self._rows_from(start):
                per_size = self._step(step, rows)
                for size, value in per_size.items():
                    losses[size].append(value)
                log.step(sum(per_size.values()), per_size)
                done = step + 1
                if folder is not None and (done % recipe.save == 0 or done == recipe.steps):
                    save_run(folder, parts, {"step": done})
        first = {m: _mean(values[:10]) for m, values in losses.items()}
        return DistilReport(recipe.steps, first, {m: _mean(v[-10:]) for m, v in losses.items()})

    def _rows_from(self, start: int) -> Iterator[tuple[int, Tensor]]:
        count, size = len(self.data), self.recipe.batch
        per_epoch = count // size
        for step in range(start, self.recipe.steps):
            epoch, at = divmod(step, per_epoch)
            yield step, next(batches(count, size, seed=self.recipe.seed, epoch=epoch, start=at))

    def _step(self, step: int, rows: Tensor) -> dict[int, float]:
        """One optimizer step; returns {size: unweighted loss}."""
        recipe = self.recipe
        per_size: dict[int, float] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        progress = step / max(1, recipe.steps)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        for shares in self.rota.passes(rows, progress, generator):
            for size, loss in self._backward(shares):
                per_size[size] = loss
        nn.utils.clip_grad_norm_(self._parameters(), recipe.clip)
        advance: Any = self.optimizer.step  # pyright: ignore[reportUnknownMemberType]
        advance()
        return per_size

    def _backward(self, shares: list[Share]) -> Iterator[tuple[int, float]]:
        """The passes of the sizes that see the same rows: the teacher looks at them once."""
        rows = shares[0].rows
        batch = self.collate([self.data[int(i)] for i in rows])
        lessons = self.lessons(rows, batch)
        args, kwargs = arguments_of(batch)
        outputs = self.doll.outputs(*args, **kwargs)
        for share in shares:
            with self._precision():
                loss = self.loss(share.size, outputs[share.size], batch, lessons)
            torch.autograd.backward(loss * share.weight, retain_graph=self.doll.plan.masked)
            yield share.size, float(loss.detach())

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.device, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"
        )

    def lessons(self, rows: Tensor, batch: object) -> list[Tensor]:
        """What the teacher says about the rows, for each term."""
        with torch.no_grad(), self._precision():
            if isinstance(self.teacher, Tensor):
                output: Any = self.teacher[rows]
            else:
                args, kwargs = arguments_of(batch)
                output = self.teacher(*args, **kwargs)
        picks = [term.of_teacher or term.of for term in self.recipe.terms]
        return [pick(output, batch) for pick in picks]

    def loss(self, size: int, output: object, batch: object, lessons: list[Tensor]) -> Tensor:
        """The weighted sum of the terms of one size, mean over the rows."""
        total = torch.zeros(())
        for number, (term, lesson) in enumerate(zip(self.recipe.terms, lessons, strict=True)):
            found = term.of(output, batch)
            key = f"{number}_{size}"
            if key in self.projections:
                found = self.projections[key](found)
            value = _divergence(term, found, lesson)
            total = total.to(value) + term.weight * value
        return total

    def _made_projections(self) -> nn.ModuleDict:
        """A projection for each size and term whose width differs from the teacher's."""
        rows = torch.arange(min(2, len(self.data)))
        batch = self.collate([self.data[int(i)] for i in rows])
        args, kwargs = arguments_of(batch)
        lessons, made = self.lessons(rows, batch), nn.ModuleDict()
        with torch.no_grad():
            outputs = self.doll.outputs(*args, **kwargs)
        for size, (number, term) in product(self.doll.sizes, enumerate(self.recipe.terms)):
            have, want = term.of(outputs[size], batch), lessons[number]
            _check_rows(size, term, have, want)
            if term.kind in PROJECTED and have.shape[-1] != want.shape[-1]:
                made[f"{number}_{size}"] = _prefix_projection(have, want)
        return made

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.doll.parameters(), *self.projections.parameters()]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self._parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.recipe.decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]


def _divergence(term: Term, found: Tensor, lesson: Tensor) -> Tensor:
    kind = KINDS[term.kind]
    found, lesson = (x.float().reshape(-1, x.shape[-1]) for x in (found, lesson))
    said = kind.lesson(lesson, term.temperature)
    return kind.divergence(found, said, term.temperature).mean()


def _check_rows(size: int, term: Term, have: Tensor, want: Tensor) -> None:
    narrow = term.kind == "kl" and have.shape != want.shape
    if have.shape[:-1] != want.shape[:-1] or narrow:
        raise DistilError(
            f"term {term.kind!r} compares {tuple(have.shape)} at size {size} with the teacher's "
            f"{tuple(want.shape)}; expected the same rows"
            + (" and as many logits" if narrow else "")
            + ": pick the parts that belong together with Term(of=..., of_teacher=...)"
        )


def _prefix_projection(have: Tensor, want: Tensor) -> nn.Linear:
    """A linear that starts as: the units are the first ones of the teacher's."""
    made = nn.Linear(have.shape[-1], want.shape[-1], bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.eye(want.shape[-1], have.shape[-1]))
    return made.to(have.device)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
