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

from matryoshkafy.dolls.batches import call_of
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.losses.distillation import KINDS
from matryoshkafy.training.resuming import batches, resume_run, save_run
from matryoshkafy.training.rows import alike
from matryoshkafy.training.rota import ROTAS, Rota, Share
from matryoshkafy.training.watching import RunLog
from matryoshkafy.units.permute import users_order

Pick = Callable[[Any, Any], Tensor]
PROJECTED = ("mse", "cosine")


class DistilError(MatryoshkafyError):
    """A recipe that does not fit the doll, the teacher or the data."""


def first_tensor(output: Any, batch: Any) -> Tensor:
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
        rate: peak learning rate of AdamW: warm-up over the first `warmup` of the steps, then down a
            half cosine to a tenth.
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
    weights: Mapping[int, float] = field(default_factory=dict)
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


def distil(  # noqa: PLR0913  the public signature
    doll: Doll,
    teacher: nn.Module | Tensor | None,
    data: Sequence[Any],
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    *,
    collate: Callable[[list[Any]], Any] = torch.stack,
    lengths: Sequence[int] | None = None,
    folder: str | os.PathLike[str] | None = None,
    watch: Callable[[int], object] | None = None,
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
        watch: called with the number of steps done, each `recipe.save` steps and at the end: the
            place to measure the doll.

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
    if lengths is not None and len(lengths) != len(data):
        raise DistilError(
            f"{len(lengths)} lengths were given for {len(data)} rows; give one for each row"
        )
    run = _Run(doll, teacher, data, recipe, collate, lengths)
    return run.carried_out(folder, watch or _nobody)


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
        self,
        doll: Doll,
        teacher: nn.Module | Tensor | None,
        data: Sequence[Any],
        recipe: Recipe,
        collate: Callable[[list[Any]], Any],
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.doll, self.data, self.recipe, self.lengths = doll, data, recipe, lengths
        # A copy of the doll has the doll's order of units, every other teacher the user's own.
        self.teacher, self.foreign = _frozen(doll, teacher), teacher is not None
        self.collate = collate
        self.device = next(doll.parameters()).device.type
        self.rota = Rota(tuple(doll.sizes), recipe.sizes, recipe.weights, recipe.widen, recipe.last)
        self.projections = self._made_projections()
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=recipe.rate)

    def carried_out(
        self, folder: str | os.PathLike[str] | None, watch: Callable[[int], object]
    ) -> DistilReport:
        """Do the steps that are left."""
        recipe, losses = self.recipe, {m: [] for m in self.doll.sizes}
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
                if done % recipe.save == 0 or done == recipe.steps:
                    if folder is not None:
                        save_run(folder, parts, {"step": done})
                    watch(done)
        first = {m: _mean(values[:10]) for m, values in losses.items()}
        return DistilReport(recipe.steps, first, {m: _mean(v[-10:]) for m, v in losses.items()})

    def _rows_from(self, start: int) -> Iterator[tuple[int, Tensor]]:
        count, size = len(self.data), self.recipe.batch
        seed, step = self.recipe.seed, start
        while step < self.recipe.steps:
            epoch, at = divmod(step, count // size)
            if self.lengths is None:
                drawn = batches(count - count % size, size, seed=seed, epoch=epoch, start=at)
            else:
                drawn = alike(self.lengths, size, seed=seed, epoch=epoch, start=at)
            for rows in drawn:
                yield step, rows
                step += 1

    def _step(self, step: int, rows: Tensor) -> dict[int, float]:
        """One optimizer step; returns {size: unweighted loss}."""
        recipe, per_size = self.recipe, {}
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        progress = step / max(1, recipe.steps)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        for shares in self.rota.passes(rows, progress, generator):
            for size, loss in self._backward(shares):
                per_size[size] = loss
        nn.utils.clip_grad_norm_(self._parameters(), recipe.clip)
        self.optimizer.step()
        return per_size

    def _backward(self, shares: list[Share]) -> Iterator[tuple[int, float]]:
        """The passes of the sizes that see the same rows: the teacher looks at them once."""
        rows = shares[0].rows
        batch = self.collate([self.data[int(i)] for i in rows])
        lessons = self.lessons(rows, batch)
        args, kwargs = call_of(batch)
        outputs = self.doll.outputs(*args, **kwargs)
        for share in shares:
            with self._precision():
                output = self.said(share.size, outputs[share.size])
                loss = self.loss(share.size, output, batch, lessons)
            (loss * share.weight).backward(retain_graph=self.doll.plan.masked)
            yield share.size, float(loss.detach())

    def said(self, size: int, output: Any) -> Any:
        """Return what a size says, the largest in the order of units that the teacher has."""
        largest = self.foreign and size == max(self.doll.sizes)
        return users_order(self.doll, output) if largest else output

    def _precision(self) -> Any:
        return torch.autocast(
            self.device, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"
        )

    def lessons(self, rows: Tensor, batch: Any) -> list[Tensor]:
        """What the teacher says about the rows, for each term."""
        with torch.no_grad(), self._precision():
            if isinstance(self.teacher, Tensor):
                output: Any = self.teacher[rows]
            else:
                args, kwargs = call_of(batch)
                output = self.teacher(*args, **kwargs)
        picks = [term.of_teacher or term.of for term in self.recipe.terms]
        return [pick(output, batch) for pick in picks]

    def loss(self, size: int, output: Any, batch: Any, lessons: list[Tensor]) -> Tensor:
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
        args, kwargs = call_of(batch)
        lessons, made = self.lessons(rows, batch), nn.ModuleDict()
        with torch.no_grad():
            outputs = self.doll.outputs(*args, **kwargs)
            units = self._units(outputs[max(self.doll.sizes)], batch)
        for size, (number, term) in product(self.doll.sizes, enumerate(self.recipe.terms)):
            have, want = term.of(outputs[size], batch), lessons[number]
            _check_rows(size, term, have, want)
            if term.kind in PROJECTED and have.shape[-1] != want.shape[-1]:
                made[f"{number}_{size}"] = _prefix_projection(have, units[number], want)
        return made

    def _units(self, output: Any, batch: Any) -> dict[int, Tensor]:
        """For each term the doll's unit [width] that stands at each place of the teacher's output.

        Places are counted in the full output, which is put back into the teacher's order.
        """
        counted = pytree.tree_map_only(Tensor, _places, output)
        back = self.said(max(self.doll.sizes), counted)
        picked = (term.of(back, batch) for term in self.recipe.terms)
        return {number: x.reshape(-1, x.shape[-1])[0] for number, x in enumerate(picked)}

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


def _places(value: Tensor) -> Tensor:
    """Return a tensor like this that holds the place in the last dim."""
    return torch.arange(value.shape[-1], device=value.device).expand_as(value).double()


def _prefix_projection(have: Tensor, units: Tensor, want: Tensor) -> nn.Linear:
    """A linear that starts as: each unit is the teacher's that it was made from."""
    narrow, wide = have.shape[-1], want.shape[-1]
    made = nn.Linear(narrow, wide, bias=False).to(have.device)
    known = units if len(units) == wide else torch.arange(wide)
    with torch.no_grad():
        made.weight.copy_(known.to(have.device)[:, None] == torch.arange(narrow).to(have.device))
    return made


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
