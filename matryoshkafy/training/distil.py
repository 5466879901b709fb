"""distil(): every size of a doll learns from a frozen teacher; a run resumes to the bit."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from matryoshkafy.dolls.batches import arguments_of, moved
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training.corrections import Corrections
from matryoshkafy.training.live_corrections import LiveCorrections
from matryoshkafy.training.recipes import DistilError, Recipe
from matryoshkafy.training.replaying import Replayed
from matryoshkafy.training.resuming import batches, is_first, resume_run, save_run
from matryoshkafy.training.rota import Rota, Share
from matryoshkafy.training.rows import alike
from matryoshkafy.training.taught import Taught
from matryoshkafy.training.watching import RunLog

Prepare = Callable[[nn.Module], nn.Module]
# {size: weight of its loss}, the batch, and what the teacher says of it for each term.
Pass = tuple[dict[int, float], Any, list[Tensor]]


@dataclass(frozen=True)
class DistilReport:
    """Steps done in all, and per size the mean loss over its first and its last ten steps; the
    learnt `corrections`, where distillation began with some.
    """

    steps: int
    first: Mapping[int, float]
    last: Mapping[int, float]
    corrections: Corrections | None = None

    def __str__(self) -> str:
        if all(math.isnan(loss) for loss in self.last.values()):
            return f"{self.steps} steps, all of them done before this call"
        rows = [f"{m:>6}  {self.first[m]:9.5f}  {self.last[m]:9.5f}" for m in self.last]
        return "\n".join([f"{self.steps} steps", f"{'size':>6}  {'first':>9}  {'last':>9}", *rows])


def distil(  # noqa: PLR0913  the public signature
    doll: Doll,
    teacher: nn.Module | Tensor | None,
    data: Sequence[object],
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    *,
    collate: Callable[[list[Any]], object] = torch.stack,
    lengths: Sequence[int] | None = None,
    folder: str | os.PathLike[str] | None = None,
    events: str | os.PathLike[str] | None = None,
    watch: Callable[[int], object] | None = None,
    prepare: Prepare | None = None,
    corrections: Corrections | None = None,
) -> DistilReport:
    """Train every size of a doll on a frozen teacher's outputs, in place.

    Order or rotate the doll first: a pretrained model's units have no order, and a start from
    unordered ones costs a multiple of the steps. Dropout and batch norm follow the doll's mode:
    call `doll.eval()` to distil without dropout.

    Args:
        doll: the student; its largest size learns from the teacher too, which anchors it.
        teacher: a module that takes what the doll takes; or its outputs for all rows, [rows, ...],
            computed once; or None for a frozen copy of the doll's full model as it is now. Their
            units stand in the user's own order, also where `order` has changed the doll's.
        data: the rows, by index.
        recipe: steps, terms, sizes.
        collate: rows -> a batch as `order` takes it (a tensor, a tuple, a mapping of keywords).
        lengths: of the rows; where given, a batch holds rows of about one length, so that little
            is padded.
        folder: where the run is saved; a run that is found there goes on where it was saved. The
            copy of teacher=None is then the doll as it comes in, so bring the same one again.
        events: a folder for TensorBoard, with a curve for each size.
        watch: called with the number of steps done, each `recipe.save` steps and at the end: the
            place to measure the doll.
        prepare: module -> module, what several processes need around the one that is trained:
            `accelerator.prepare`, DistributedDataParallel, or FSDP2's fully_shard. Each process
            computes its part of the rows of a batch, and only they are compared with each other.
        corrections: `Corrections.start(doll)`: each size learns with a few numbers of its own, too.
            Cut slices with the report's (`report.corrections.slice(doll, size)`); the doll itself
            is without.

    Returns:
        The losses per size of the steps done in this call, and the corrections as they are then.

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
    world = dist.get_world_size() if prepare is not None and dist.is_initialized() else 1
    if recipe.batch % world:
        raise DistilError(
            f"a batch of {recipe.batch} rows does not divide among {world} processes; give a "
            f"multiple of {world}"
        )
    if lengths is not None and len(lengths) != len(data):
        raise DistilError(
            f"{len(lengths)} lengths were given for {len(data)} rows; give one for each row"
        )
    live = None if corrections is None else LiveCorrections(doll, corrections)
    student = Student(doll, teacher, live)
    run = _Run(student, Rows(data, collate, lengths, world), recipe, prepare)
    return run.carried_out(Places(folder, events), watch or _nobody)


@dataclass(frozen=True)
class Student:
    """Who learns from whom, and with which corrections."""

    doll: Doll
    teacher: nn.Module | Tensor | None
    corrections: LiveCorrections | None = None


@dataclass(frozen=True)
class Places:
    """Where a run is saved, and where its curves go; None: nowhere."""

    run: str | os.PathLike[str] | None
    events: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, how a batch is made of some, and who computes them."""

    data: Sequence[object]
    collate: Callable[[list[Any]], object]
    lengths: Sequence[int] | None = None
    world: int = 1

    def batch(self, rows: Tensor) -> object:
        """Return the batch of some rows."""
        return self.collate([self.data[int(i)] for i in rows])

    def drawn(self, size: int, seed: int, start: int) -> Iterator[Tensor]:
        """Yield the rows of each batch from a step on, epoch after epoch."""
        count, step = len(self.data), start
        while True:
            epoch, at = divmod(step, count // size)
            if self.lengths is None:
                found = batches(count - count % size, size, seed=seed, epoch=epoch, start=at)
            else:
                found = alike(self.lengths, size, seed=seed, epoch=epoch, start=at)
            for rows in found:
                yield rows
                step += 1

    def mine(self, rows: Tensor) -> Tensor:
        """Return this process' part of a batch."""
        return rows[dist.get_rank() :: self.world] if self.world > 1 else rows


def _nobody(_: int) -> None:
    """Watches nothing."""


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
        self, student: Student, rows: Rows, recipe: Recipe, prepare: Prepare | None = None
    ) -> None:
        doll, teacher = student.doll, student.teacher
        self.doll, self.rows, self.recipe = doll, rows, recipe
        # A copy of the doll has the doll's order of units, every other teacher the user's own.
        self.teacher = _frozen(doll, teacher)
        self.device = next(doll.parameters()).device.type
        self.rota = Rota(tuple(doll.sizes), recipe.sizes, recipe.weights, recipe.widen, recipe.last)
        foreign = teacher is not None
        live = student.corrections
        self.taught = Taught(doll, recipe.terms, foreign=foreign, corrections=live)
        first = torch.arange(min(8, len(rows.data)))
        batch = moved(rows.batch(first), doll)
        self.taught.project(batch, self.lessons(first, batch))
        self.model = self.taught if prepare is None else prepare(self.taught)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        replays = recipe.replay and self.device == "cuda"
        groups = self._parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, capturable=replays)
        self.replayed = Replayed(self._backward, self.optimizer, recipe.clip, records=replays)

    def carried_out(self, places: Places, watch: Callable[[int], object]) -> DistilReport:
        """Do the steps that are left."""
        recipe = self.recipe
        losses: dict[int, list[float]] = {m: [] for m in self.doll.sizes}
        projections, own = self.taught.projections, self.taught.corrections
        parts = {"model": self.doll, "projections": projections, "optimizer": self.optimizer}
        parts |= {} if own is None else {"corrections": own}
        position = None if places.run is None else resume_run(places.run, parts)
        self.replayed.hold_rates()
        start = 0 if position is None else position["step"]
        drawn = self.rows.drawn(recipe.batch, recipe.seed, start)
        with self._log(start, places.events) as log:
            for step, rows in zip(range(start, recipe.steps), drawn, strict=False):
                per_size = self._step(step, rows)
                for size, value in per_size.items():
                    losses[size].append(value)
                log.step(sum(per_size.values()), per_size)
                if (step + 1) % recipe.save == 0 or step + 1 == recipe.steps:
                    self._saved(places.run, parts, step + 1)
                    watch(step + 1)
        first = {m: _mean(values[:10]) for m, values in losses.items()}
        last = {m: _mean(v[-10:]) for m, v in losses.items()}
        return DistilReport(recipe.steps, first, last, None if own is None else own.found())

    def _saved(
        self, folder: str | os.PathLike[str] | None, parts: Mapping[str, object], done: int
    ) -> None:
        if folder is not None:
            save_run(folder, parts, {"step": done})

    def _log(self, start: int, events: str | os.PathLike[str] | None) -> RunLog:
        folder = events if is_first() else None
        return RunLog(self.recipe.steps, start=start, console=Console(stderr=True), folder=folder)

    def _step(self, step: int, rows: Tensor) -> dict[int, float]:
        """One optimizer step; returns {size: unweighted loss}."""
        recipe = self.recipe
        self.replayed.set_rates([recipe.rate_at(step)] * len(self.optimizer.param_groups))
        progress = step / max(1, recipe.steps)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        passes = [
            self._pass(shares)
            for shares in self.rota.passes(self.rows.mine(rows), progress, generator)
        ]
        losses = self.replayed(*passes).cpu()
        sizes = (size for weights, _, _ in passes for size in weights)
        return {size: float(loss) for size, loss in zip(sizes, losses, strict=True)}

    def _pass(self, shares: list[Share]) -> Pass:
        """The sizes that see the same rows: the teacher looks at them once."""
        rows = shares[0].rows
        batch = moved(self.rows.batch(rows), self.doll)
        lessons = self.lessons(rows, batch)
        if self.replayed.records and isinstance(batch, Mapping):
            # A recording finds the tensors of a plain mapping, not those of a class of its own.
            batch = dict(cast("Mapping[str, object]", batch))
        return {share.size: share.weight for share in shares}, batch, lessons

    def _backward(self, *passes: Pass) -> Tensor:
        """Gradients of all passes; returns the unweighted losses in their order."""
        found: list[Tensor] = []
        for weights, batch, lessons in passes:
            # A masked doll computes its sizes in one pass; a sliced one in passes of their own, the
            # memory of one at a time.
            each = [[size] for size in weights]
            for sizes in [list(weights)] if self.doll.plan.masked else each:
                with self._precision():
                    losses = self.model(sizes, batch, lessons)
                parts = zip(sizes, losses, strict=True)
                torch.autograd.backward(torch.stack([weights[m] * part for m, part in parts]).sum())
                found.append(losses.detach())
        return torch.cat(found)

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.device, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"
        )

    def lessons(self, rows: Tensor, batch: object) -> list[Tensor]:
        """What the teacher says about the rows, for each term."""
        with torch.no_grad(), self._precision():
            if isinstance(self.teacher, Tensor):
                output: Any = moved(self.teacher[rows.to(self.teacher.device)], self.doll)
            else:
                args, kwargs = arguments_of(batch)
                output = self.teacher(*args, **kwargs)
        picks = [term.of_teacher or term.of for term in self.recipe.terms]
        return [pick(output, batch) for pick in picks]

    def _parameter_groups(self) -> list[dict[str, object]]:
        return [
            {
                "params": [p for p in self.trained if p.dim() >= 2],
                "weight_decay": self.recipe.decay,
            },
            {"params": [p for p in self.trained if p.dim() < 2], "weight_decay": 0.0},
        ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
