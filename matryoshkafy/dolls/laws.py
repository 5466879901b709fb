"""The laws as rows: what of a doll is compared with what, beside the values of its sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from typing import Any

import torch
from torch import nn

from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.dolls.measure import (
    GradientsError,
    Written,
    gradients_of,
    relative_error,
    run,
    tolerance_of,
)
from matryoshkafy.dolls.obeys import check_sizes
from matryoshkafy.dolls.pickling import reduced
from matryoshkafy.dolls.slice import parts_of, state_of
from matryoshkafy.errors import MatryoshkafyError, PlanError, first_line
from matryoshkafy.graph.copies import seed_torch
from matryoshkafy.graph.guards import Guards
from matryoshkafy.graph.trials import classes, other_sizes, resized
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.graphs import Graphs, outputs_graph

# Sums of gradients run over every position of a batch, so they round more than an output does.
GRADIENT_ROUNDING = 10.0


@dataclass(frozen=True)
class Law:
    """One law on one model.

    Args:
        number: of the law, 1 to 11.
        name: what it says.
        holds: whether it holds; None where it was not measured.
        error: how far off, relative.
        detail: on what.
    """

    number: int
    name: str
    holds: bool | None
    error: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[self.holds]
        return f"law {self.number:>2}  {self.name:<34}  {verdict:<12}  {self.detail}".rstrip()


@dataclass(frozen=True)
class Question:
    """A doll, a call of it, and the model (or {size: the native model}) that it is held against."""

    doll: Doll
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    against: nn.Module | Mapping[int, nn.Module] | None = None

    @property
    def original(self) -> nn.Module | None:
        """The user's model, where it is at hand."""
        return self.against if isinstance(self.against, nn.Module) else None

    @cached_property
    def written(self) -> Written:
        """The doll's graphs and slices."""
        return Written(self.doll)

    @property
    def flat(self) -> list[torch.Tensor]:
        """The flat inputs of the doll's graphs."""
        return trace_of(self.doll).signature.flatten(self.args, dict(self.kwargs))


def rows(asked: Question) -> Iterator[Law]:
    """Yield the laws that are no matter of a single size."""
    yield _identity(asked)
    yield _survives(asked)
    yield _names(asked.written)
    yield _reported(asked.doll.plan)
    yield _gradients(asked)
    yield _guards(asked)
    yield _obeyed(asked.doll)
    yield _natives(asked)


def _identity(asked: Question) -> Law:
    """At full width a sliced doll is the user's model; a masked one computes something else."""
    name = "full width is identity"
    if asked.original is None:
        return Law(1, name, None, detail="give against=model")
    error = relative_error(_call(asked.doll, asked), _call(asked.original, asked))
    if asked.doll.plan.masked:
        return Law(1, name, None, error, f"masked nesting is another function, {error:.1e} away")
    return Law(1, name, error <= tolerance_of(asked.doll), error, f"{error:.1e}")


def _call(model: nn.Module, asked: Question) -> Any:
    seed_torch(0)
    training = model.training
    model.eval()
    try:
        return model(*asked.args, **asked.kwargs)
    finally:
        model.train(training)


def _survives(asked: Question) -> Law:
    """The part of loading that needs no file: a model made of the doll's words, over its tensors,
    has the doll's plan and its outputs of every size, bit for bit.
    """
    name, doll = "a doll survives its file", asked.doll
    if Plan.from_json(doll.plan.to_json()) != doll.plan:
        return Law(4, name, False, detail="its plan comes back as another")
    try:
        make, words = reduced(doll)
        again = make(*words)
    except MatryoshkafyError as error:
        return Law(4, name, None, detail=f"it is not saved: {first_line(error)}")
    trace, plan = parts_of(again)
    root, flat = root_of(again) if isinstance(again, Doll) else again, asked.flat
    levels = range(plan.levels)
    own = [run(asked.written.at(level), root_of(doll), flat) for level in levels]
    other = [run(outputs_graph(trace, plan, [level]), root, flat) for level in levels]
    moved = max(starmap(relative_error, zip(other, own, strict=True)))
    return Law(4, name, moved == 0, moved, "" if moved == 0 else f"outputs move by {moved:.1e}")


def _names(written: Written) -> Law:
    """Every tensor of a slice has the user's name, and what was one tensor is one."""
    own, small = state_of(written.doll), state_of(written.slice(0))
    shown = written.slice(0).state_dict().keys()
    strange = sorted(n for n in small if n not in own and n in shown)
    ties = {(a, b) for a in small for b in small if a in own and b in own and own[a] is own[b]}
    loose = sorted(a for a, b in ties if small[a] is not small[b])
    wrong = [*strange, *loose]
    return Law(6, "names and ties survive", not wrong, detail=", ".join(wrong[:3]))


def _reported(plan: Plan) -> Law:
    unknown = ", ".join(sorted({u.op for u in plan.unknown})[:5])
    return Law(
        7, "never silently wrong", True, detail=f"ops without a rule: {unknown}" if unknown else ""
    )


def _gradients(asked: Question) -> Law:
    name = "gradients are the model's"
    if asked.original is None or asked.doll.plan.masked:
        why = "give against=model" if asked.original is None else "masked: another function"
        return Law(8, name, None, detail=why)
    try:
        theirs = _gradients_of(asked.original, asked)
    except GradientsError as error:
        return Law(8, name, None, detail=f"the model itself has none: {error}")
    try:
        ours = _gradients_of(asked.doll, asked)
    except GradientsError as error:
        return Law(8, name, False, float("inf"), f"the doll has none: {error}")
    scale = max((g.abs().max().item() for g in theirs.values()), default=0.0)
    errors = {
        n: ((ours[n] if n in ours else torch.zeros_like(g)) - g).abs().max().item()
        for n, g in theirs.items()
    }
    worst = max(errors, key=lambda n: errors[n], default="")
    error = errors.get(worst, 0.0) / max(scale, 1e-30)
    holds = error <= GRADIENT_ROUNDING * tolerance_of(asked.doll)
    return Law(8, name, holds, error, f"{error:.1e}" + ("" if holds else f" at {worst}"))


def _gradients_of(model: nn.Module, asked: Question) -> dict[str, torch.Tensor]:
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        return gradients_of(_call(model, asked), weights)


def _guards(asked: Question) -> Law:
    """A size that the trace fixed is refused at any other; one that it left free can change."""
    name = "inside its guards or not at all"
    guards, flat = trace_of(asked.doll).signature.guards, asked.flat
    for group in classes(guards):
        tried = other_sizes(guards, [tuple(t.shape) for t in flat], group)
        failures = [_failure(asked.written, resized(flat, sizes)) for sizes in tried]
        if failures and all(failures):
            return Law(9, name, False, detail=failures[0])
    passing = _unguarded(guards, flat)
    detail = f"not refused: {passing}" if passing else f"{len(guards.conditions)} guards"
    return Law(9, name, not passing, detail=detail)


def _failure(written: Written, inputs: list[torch.Tensor]) -> str:
    """Return what stops the doll at other sizes, "" if nothing does."""
    try:
        run(written.full, root_of(written.doll), inputs)
    except (RuntimeError, IndexError, MatryoshkafyError) as error:
        return first_line(error)
    return ""


def _unguarded(guards: Guards, flat: list[torch.Tensor]) -> str:
    """Return a fixed size that may be changed without a word, "" where there is none."""
    for guard in (g for g in guards.conditions if g.fixes):
        size = guard.sizes[0]
        now = flat[size.leaf].shape[size.dim]
        try:
            guards.check(resized(flat, {size: now + 1}))
        except MatryoshkafyError:
            continue
        return guards.text(guard)
    return ""


def _obeyed(doll: Doll) -> Law:
    name = "the plan is obeyed"
    try:
        check_sizes(Graphs(trace_of(doll), doll.plan))
    except PlanError as error:
        return Law(10, name, False, detail=first_line(error))
    return Law(10, name, True)


def _natives(asked: Question) -> Law:
    """Where a native class at the smaller size is at hand, the slice equals it."""
    name = "truth from outside"
    if asked.against is None or isinstance(asked.against, nn.Module):
        return Law(11, name, None, detail="give against={size: native model}")
    errors = {size: _native_error(asked, size, m) for size, m in asked.against.items()}
    worst = max(errors, key=lambda s: errors[s])
    holds = errors[worst] <= tolerance_of(asked.doll)
    return Law(11, name, holds, errors[worst], f"{errors[worst]:.1e} at size {worst}")


def _native_error(asked: Question, size: int, native: nn.Module) -> float:
    """Give a copy of the native model the slice's own tensors, and compare their outputs."""
    _, plan = parts_of(asked.doll)
    if size not in plan.sizes:
        raise PlanError(f"against has the size {size}; this model has {list(plan.sizes)}")
    small, native = asked.written.slice(plan.sizes.index(size)), copy.deepcopy(native)
    try:
        native.load_state_dict(small.state_dict(), strict=False)
    except RuntimeError:
        return float("inf")
    return relative_error(_call(small, asked), _call(native, asked))
