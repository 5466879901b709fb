"""verify(): the laws on the user's own model, with numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from matryoshkafy.dolls.beyond import beyond
from matryoshkafy.dolls.calls import refuse_meta
from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.dolls.laws import GRADIENT_ROUNDING, Law, Question, rows
from matryoshkafy.dolls.measure import (
    TOLERANCE,
    GradientsError,
    Written,
    disturb,
    doubled,
    evaluated,
    feeding,
    prefix_inputs,
    prefixes,
    relative_error,
    run,
    tolerance_of,
    values_of,
)
from matryoshkafy.dolls.slice import parts_of, refuse_missing, slice, state_of
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.signature import as_inputs

__all__ = ["TOLERANCE", "Law", "Report", "SizeReport", "relative_error", "verify"]


@dataclass(frozen=True)
class SizeReport:
    """What was measured at one size; errors are relative to the largest value of the tensor.

    Args:
        size: the size.
        output_error: the doll's output of this size against the standalone sub-model's.
        trunk_error: the worst node of the trunk against the same node of the sub-model.
        beyond_error: how far the output moves when everything past the prefix is replaced by noise.
        gradient_error: how far its gradients move then, or reach past the prefix.
        resliced: whether a slice of the next larger slice equals this one bit for bit.
        trunk_nodes: how many nodes were compared.
        parameters: scalars of the sub-model.
        bytes: of its parameters and buffers.
        underived: why its gradients could not be measured ("": they were).
    """

    size: int
    output_error: float
    trunk_error: float
    beyond_error: float
    gradient_error: float
    resliced: bool
    trunk_nodes: int
    parameters: int
    bytes: int
    underived: str = ""

    @property
    def gradient_text(self) -> str:
        """How far gradients move, as a table shows it."""
        return "none" if self.underived else f"{self.gradient_error:.1e}"


@dataclass(frozen=True)
class Report:
    """The laws on one model: `passed`, and what was measured.

    Args:
        tolerance: largest relative error that passes.
        tail_share: share of the nodes that are computed once per size.
        sizes: a row per size.
        others: the laws that are no matter of a single size.
        exact: the same report in float64, made where an error in the model's own type is above the
            tolerance: what agrees there is the same arithmetic, and the difference is rounding.
        whole: parameters that are part of every size whole: a statistic of them is held at full
            width (weight normalisation), so law 5 does not speak of them.
    """

    tolerance: float
    tail_share: float
    sizes: tuple[SizeReport, ...]
    others: tuple[Law, ...] = ()
    exact: Report | None = None
    whole: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every law that was measured holds at every size."""
        return all(law.holds is not False for law in self.laws)

    @property
    def laws(self) -> tuple[Law, ...]:
        """Every law as a row, by its number."""
        sizes = (self.exact or self).sizes
        allowed = (self.exact or self).tolerance
        prefix_error = max(max(s.output_error, s.trunk_error) for s in sizes)
        beyond = max(s.beyond_error for s in sizes)
        learnt = max(s.gradient_error for s in sizes)
        why = next((s.underived for s in sizes if s.underived), "")
        gradients = f"not measured: {why}" if why else f"{learnt:.1e}"
        still = beyond <= allowed and learnt <= GRADIENT_ROUNDING * allowed
        resliced = all(s.resliced for s in self.sizes)
        note = " (float64)" if self.exact else ""
        whole = f"; whole in every size: {', '.join(self.whole)}" if self.whole else ""
        own = (
            Law(2, "a size is a prefix", prefix_error <= allowed, prefix_error,
                f"{prefix_error:.1e}{note}"),
            Law(3, "a slice of a slice", resliced),
            Law(5, "nothing beyond a prefix counts", still, max(beyond, learnt),
                f"values {beyond:.1e}, gradients {gradients}{note}{whole}"),
        )  # fmt: skip
        return tuple(sorted((*own, *self.others), key=lambda law: law.number))

    def __str__(self) -> str:
        head = (
            f"{'size':>6}  {'output':>9}  {'trunk':>9}  {'beyond':>9}  {'gradient':>9}  "
            f"{'reslice':>7}  {'parameters':>12}  {'bytes':>14}"
        )
        rows = [
            f"{s.size:>6}  {s.output_error:9.1e}  {s.trunk_error:9.1e}  {s.beyond_error:9.1e}  "
            f"{s.gradient_text:>9}  {'same' if s.resliced else 'DIFFERS':>7}  "
            f"{s.parameters:>12,}  {s.bytes:>14,}"
            for s in self.sizes
        ]
        verdict = "every law holds" if self.passed else "A LAW FAILS"
        return "\n".join(
            [
                head,
                *rows,
                *(str(law) for law in self.laws if law.holds is False),
                *self._remarks(),
                f"{verdict} (tolerance {self.tolerance:g}, tail {self.tail_share:.0%} of nodes)",
            ]
        )

    def _remarks(self) -> Iterator[str]:
        if self.exact and self.exact.passed:
            yield "errors above the tolerance are rounding: in float64 every size agrees"
        why = next((s.underived for s in self.sizes if s.underived), "")
        if why:
            yield f"gradients were not measured: {why}"
        if self.whole:
            yield f"whole in every size, for a statistic at full width: {', '.join(self.whole)}"


def verify(
    model: nn.Module,
    args: object = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    against: nn.Module | Mapping[int, nn.Module] | None = None,
) -> Report:
    """Check the laws of a doll on inputs, in evaluation mode.

    For each size: the standalone sub-model equals the doll's output of that size, its trunk equals
    the prefix of the doll's (masked) or the doll's live slices (sliced), noise past the prefix
    moves neither its values nor its gradients, and slicing twice is slicing once. The other laws
    stand in `Report.laws`.

    Args:
        model: a doll, or a sub-model of one.
        args: inputs, as the model takes them.
        kwargs: further inputs by name.
        against: the user's own model (outputs and gradients of a sliced doll are its own), or
            {size: the native model of that size} (each slice is the native class with its state).

    Returns:
        The report: `passed`, `laws` (a row each), `sizes`.

    Raises:
        PlanError: the model is no doll and no sub-model, or has no values (device meta).
        TraceError: torch's default device has no values.
    """
    trace, plan = parts_of(model)
    refuse_missing(plan, state_of(model))
    doll = model if isinstance(model, Doll) else Doll(trace, plan)
    _refuse_valueless(doll)
    signature = trace.signature
    names = {*signature.positional, *(item.name for item in signature.inputs)}
    asked = Question(doll, *as_inputs(args, kwargs, names), against)
    with evaluated(doll):
        report = _report(asked.written, asked.flat)
        if not report.passed and report.tolerance > TOLERANCE[torch.float64]:
            report = replace(report, exact=_exact(doll, asked.flat))
        return replace(report, others=tuple(rows(asked)))


def _refuse_valueless(doll: Doll) -> None:
    """Refuse to measure where there are no numbers."""
    name = next((n for n, t in state_of(doll).items() if t.is_meta), "")
    if name:
        raise PlanError(
            f"{name} is on the device 'meta' and has no values; expected weights to measure. Give "
            "them memory (doll.to_empty(device=...), then load_state_dict), and verify that."
        )
    refuse_meta(doll, ())


def _exact(doll: Doll, flat: list[torch.Tensor]) -> Report | None:
    """Return the report in float64; None where the model does not compute in it."""
    try:
        copied, inputs = doubled(doll, flat)
        return _report(Written(copied), inputs)
    except (RuntimeError, TypeError):
        return None


def _report(written: Written, flat: list[torch.Tensor]) -> Report:
    doll, plan = written.doll, written.plan
    work = [n for n in trace_of(doll).graph.nodes if n.op == "call_function"]
    share = len(plan.tail) / max(1, len(work))
    measured: list[SizeReport] = []
    full = values_of(written.full, root_of(doll), flat) if plan.masked else None
    noisy = copy.deepcopy(doll)
    generator = torch.Generator().manual_seed(0)
    for level in reversed(range(plan.levels)):
        disturb(noisy, plan, level, generator)
        measured.append(_size_report(_Models(written, noisy), level, flat, full))
    whole = tuple(sorted(feeding(doll, plan)))
    return Report(tolerance_of(doll), share, tuple(measured[::-1]), whole=whole)


@dataclass(frozen=True)
class _Models:
    """What is compared at a size: the doll with its slices, and one whose far units are noise."""

    own: Written
    noisy: Doll


def _size_report(
    models: _Models, level: int, flat: list[torch.Tensor], full: dict[str, Any] | None
) -> SizeReport:
    doll, noisy, plan = models.own.doll, models.noisy, models.own.plan
    graph, small = models.own.at(level), models.own.slice(level)
    values = values_of(small.graph, small, prefix_inputs(doll, (plan, level), flat))
    reference = values.pop("output")
    live = values_of(graph, root_of(doll), flat)
    own = live.pop("output")
    moved = run(graph, root_of(noisy), flat)
    if full is None:
        full = live
        pairs = [(full[n], v) for n, v in values.items() if n in full]
    else:
        pairs = [(a, b) for _, a, b in prefixes(plan, level, full, values)]
    learnt, why = _beyond(models, level, flat)
    return SizeReport(
        size=plan.sizes[level],
        output_error=relative_error(own, reference),
        trunk_error=max((relative_error(a, b) for a, b in pairs), default=0.0),
        beyond_error=relative_error(moved, own),
        gradient_error=learnt,
        resliced=level + 1 == plan.levels or _resliced(models.own, level),
        trunk_nodes=len(pairs),
        parameters=sum(p.numel() for p in small.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in _tensors(small)),
        underived=why,
    )


def _beyond(models: _Models, level: int, flat: list[torch.Tensor]) -> tuple[float, str]:
    """Return how far gradients move, and why that could not be measured.

    Nothing learns through an op without a derivative; a backward that fails otherwise is a fault.
    """
    try:
        return beyond(models.own, models.noisy, level, flat), ""
    except GradientsError as error:
        return 0.0 if error.absent else float("inf"), str(error)


def _resliced(written: Written, level: int) -> bool:
    """Tell whether a slice of the next larger slice is this one, bit for bit."""
    again = slice(written.slice(level + 1), written.plan.sizes[level])
    first, second = state_of(again), state_of(written.slice(level))
    return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is NaN
