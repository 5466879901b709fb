"""refuse_broken(): convert returns only dolls that keep their laws on the example."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from matryoshkafy.axes.dims import is_nested
from matryoshkafy.dolls.calls import Call
from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.dolls.measure import (
    TOLERANCE,
    doubled,
    evaluated,
    prefix_inputs,
    prefixes,
    relative_error,
    run,
    tolerance_of,
    values_of,
)
from matryoshkafy.dolls.slice import cut_out, state_of
from matryoshkafy.errors import MatryoshkafyError, PlanError, first_line
from matryoshkafy.graph.nodes import op_key
from matryoshkafy.graph.quiet import silent
from matryoshkafy.rewrite.graphs import full_graph, outputs_graph
from matryoshkafy.rules import op_of

Failed = (RuntimeError, IndexError, TypeError, AttributeError, ValueError)
EXECUTING = re.compile(r"While executing %(\w+)")
REMEDY = (
    "Hold that part whole with keep=[...], try the other nesting, or give check=False to convert "
    "it all the same."
)


def refuse_broken(doll: Doll, call: Call) -> None:
    """Compute every size of a doll on the example, beside its slice.

    Raises:
        PlanError: a size cannot be computed, or is not what its slice computes; it names the size,
            the first value that differs, the user's line, and what to do.
    """
    flat = trace_of(doll).signature.flatten(call.args, dict(call.kwargs))
    state = (*trace_of(doll).state().values(), *flat)
    if any(t.is_meta for t in state):
        return
    with silent(), evaluated(doll):
        together, why = _together(doll, flat)
        for level in reversed(range(doll.plan.levels)):
            failure = _failure(doll, level, flat, together)
            if failure:
                raise PlanError(f"size {doll.plan.sizes[level]} {failure}. {REMEDY}")
        if why:
            raise PlanError(f"the pass over all sizes fails on the example: {why}. {REMEDY}")


def _together(doll: Doll, flat: list[torch.Tensor]) -> tuple[list[object], str]:
    """Return the flat outputs of every size of a masked doll from its one pass, or why it fails.

    Nothing in sliced nesting: there each size is a pass of its own.
    """
    if not doll.plan.masked:
        return [], ""
    levels = list(range(doll.plan.levels))
    try:
        out = run(outputs_graph(trace_of(doll), doll.plan, levels), root_of(doll), flat)
    except Failed as error:
        return [], _told(doll, error)
    count = len(out) // len(levels)
    return [out[i * count : (i + 1) * count] for i in levels], ""


def _failure(doll: Doll, level: int, flat: list[torch.Tensor], together: list[object]) -> str:
    """Return what is wrong with a size on the example, "" if nothing is."""
    try:
        error = _error(doll, level, flat, together)
    except MatryoshkafyError as error:
        return f"cannot be computed on the example: {error}"
    except Failed as error:
        return f"cannot be computed on the example: {_told(doll, error)}"
    if error <= tolerance_of(doll) or _draws(doll) or _is_rounding(doll, level, flat):
        return ""
    return f"is not what its slice computes on the example: {_where(doll, level, flat, error)}"


def _error(doll: Doll, level: int, flat: list[torch.Tensor], together: list[object]) -> float:
    plan, trace = doll.plan, trace_of(doll)
    if together:
        own = together[level]
    else:
        own = run(outputs_graph(trace, plan, [level]), root_of(doll), flat)
    if level == plan.levels - 1:
        return 0.0
    graph, root = cut_out(trace, plan, state_of(doll), level)
    small = run(graph, root, prefix_inputs(doll, (plan, level), flat))
    return relative_error(own, small)


def _draws(doll: Doll) -> bool:
    """Tell whether a masked trunk draws noise of a width: a slice may draw other numbers."""
    return doll.plan.masked and any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and not op_of(node).training
        and any(is_nested(dim) for shape in doll.plan.outputs(node.name) for dim in shape)
        for node in trace_of(doll).graph.nodes
    )


def _is_rounding(doll: Doll, level: int, flat: list[torch.Tensor]) -> bool:
    """In float64 two ways of computing one thing agree, whatever they round to in float32."""
    try:
        wide, inputs = doubled(doll, flat)
        return _error(wide, level, inputs, []) <= TOLERANCE[torch.float64]
    except Failed:
        return False


def _told(doll: Doll, error: Exception) -> str:
    """Return the first line of an error with the user's line that it came from."""
    found = EXECUTING.search(str(error))
    return f"{first_line(error)}{_line(doll, found.group(1)) if found else ''}"


def _where(doll: Doll, level: int, flat: list[torch.Tensor], error: float) -> str:
    """Name the first value of the trunk that differs, or the output."""
    first = next(_differing(doll, level, flat), "")
    what = f"the value {first!r}{_line(doll, first)}" if first else "the output"
    return f"{what} is off by {error:.1e} (at most {tolerance_of(doll):g} expected)"


def _differing(doll: Doll, level: int, flat: list[torch.Tensor]) -> Iterator[str]:
    plan = doll.plan
    if not plan.masked:
        return
    graph, small = cut_out(trace_of(doll), plan, state_of(doll), level)
    full = values_of(full_graph(trace_of(doll), plan), root_of(doll), flat)
    mine = values_of(graph, small, prefix_inputs(doll, (plan, level), flat))
    for name, a, b in prefixes(plan, level, full, mine):
        if relative_error(a, b) > tolerance_of(doll):
            yield name


def _line(doll: Doll, name: str) -> str:
    node = next((n for n in trace_of(doll).graph.nodes if n.name == name), None)
    if node is None:
        return ""
    return f" ({op_key(node)} at {node.meta.get('source') or 'an unknown line'})"
