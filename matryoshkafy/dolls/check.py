"""refuse_broken(): convert returns only dolls that keep their laws on the example."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from matryoshkafy.axes.dims import Dim, is_nested
from matryoshkafy.dolls.calls import Call
from matryoshkafy.dolls.cuts import CutState
from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.dolls.measure import (
    TOLERANCE,
    Seen,
    doubled,
    evaluated,
    prefix_inputs,
    prefixes,
    relative_error,
    run,
    tolerance_of,
    values_of,
)
from matryoshkafy.dolls.obeys import Checker, check_sizes
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.errors import MatryoshkafyError, PlanError, first_line
from matryoshkafy.graph.copies import forked
from matryoshkafy.graph.nodes import bound_args, op_key, tensor_info
from matryoshkafy.graph.normalise import rank_by_call
from matryoshkafy.graph.quiet import modes_kept, silent
from matryoshkafy.graph.trace import Trace
from matryoshkafy.graph.trials import others_of, resized
from matryoshkafy.kernels.levels import RunsError
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.graphs import Graphs, full_graph
from matryoshkafy.rules import op_of

Failed = (RuntimeError, IndexError, TypeError, AttributeError, ValueError)
EXECUTING = re.compile(r"While executing %(\w+)")
REMEDY = (
    "Hold that part whole with keep=[...], try the other nesting, or give check=False to convert "
    "it all the same."
)


@dataclass(frozen=True)
class Example:
    """A doll, the flat tensors of its example, and the graphs of its sizes; `seen` looks at the
    size of every value.
    """

    doll: Doll
    flat: Sequence[torch.Tensor]
    graphs: Graphs
    seen: Seen | None = None

    def own(self, *levels: int) -> Any:
        """Return what the doll computes at levels, one flat list after the other."""
        return run(self.graphs.outputs(levels), root_of(self.doll), self.flat, self.seen)

    def cut(self, level: int) -> tuple[fx.Graph, nn.Module, list[torch.Tensor]]:
        """Return the graph of a slice, the state that it reads, and its inputs."""
        doll, graph = self.doll, self.graphs.sub(level)
        state = CutState(trace_of(doll), doll.plan, state_of(doll), level, graph)
        return graph, state, prefix_inputs(doll, (doll.plan, level), self.flat)


def refuse_broken(doll: Doll, call: Call, graphs: Graphs) -> None:
    """Compute every size of a doll on the example, beside its slice.

    Raises:
        PlanError: a size cannot be computed, is not what its slice computes, or has a value of
            another size than the plan says; it names the size, the first value that differs, the
            user's line, and what to do.
    """
    flat = trace_of(doll).signature.flatten(call.args, dict(call.kwargs))
    state = (*trace_of(doll).state().values(), *flat)
    nothing = any(t.is_meta for t in state)
    seen = Checker(graphs.trace, graphs.plan).seen if _as_traced(graphs.trace, flat) else None
    if nothing or seen is None:
        check_sizes(graphs)
    if nothing:
        return
    example = Example(doll, flat, graphs, seen)
    with silent(), evaluated(doll):
        together, why = _together(example)
        for level in reversed(range(doll.plan.levels)):
            failure = _failure(example, level, together)
            if failure:
                raise PlanError(f"size {doll.plan.sizes[level]} {failure}. {_remedy(doll)}")
        if why:
            raise PlanError(f"the pass over all sizes fails on the example: {why}. {_remedy(doll)}")


def _remedy(doll: Doll) -> str:
    node = rank_by_call(trace_of(doll).graph)
    if node is None:
        return REMEDY
    return (
        f"squeeze() at {node.meta.get('source') or node.name} drops every dim of one unit, of an "
        "example of one row its batch, too, and one pass finds its sizes by their dim: squeeze "
        f"only dims of one unit in every call, or give an example of two rows. {REMEDY}"
    )


def with_levels(found: Trace, plan: Plan, call: Call) -> tuple[Trace, Plan]:
    """Return trace and plan after trials of masked nesting at other sizes of the inputs.

    Where a width stands in one dim with a size of an input (x.flatten(1), then a norm), the levels
    of that dim are those of the example: the size is fixed, and a remark says so.
    """
    node = _beside_a_size(found, plan) if plan.masked else None
    if node is None:
        return found, plan
    guards, flat = found.signature.guards, found.signature.flatten(call.args, dict(call.kwargs))
    if any(t.is_meta for t in (*found.state().values(), *flat)):
        return found, plan
    shapes, graph = [tuple(t.shape) for t in flat], full_graph(found, plan)
    others = [sizes for sizes in others_of(guards, shapes) if sizes is not None]
    with silent(), modes_kept(found.root), torch.no_grad(), forked():
        found.root.training = False
        # One pass at other sizes of all inputs mostly settles it.
        every = {size: n for sizes in others for size, n in sizes.items()}
        tried = () if _has_levels(graph, found.root, resized(flat, every)) else others
        lacking = [s for s in tried if not _has_levels(graph, found.root, resized(flat, s))]
    if not lacking:
        return found, plan
    source = str(node.meta.get("source") or "masked nesting")
    fixed = {s: shapes[s.leaf][s.dim] for sizes in lacking for s in sizes}
    held = guards.with_fixed(fixed, source)
    new = (held.text(g) for g in held.conditions if g.fixes and g.sizes[0] in fixed)
    notes = tuple(f"other sizes are refused: {text}, by {source}" for text in new)
    signature = replace(found.signature, guards=held)
    return replace(found, signature=signature), replace(plan, remarks=(*plan.remarks, *notes))


def _beside_a_size(found: Trace, plan: Plan) -> fx.Node | None:
    """Return the first node whose levels lie in one dim with what may be a size of an input."""
    graph, free = found.graph, found.signature.guards.free
    holes = [tensor_info(n).shape for n in graph.find_nodes(op="placeholder")]
    sizes = [n for n in (holes[s.leaf][s.dim] for s in free) if n > 1]
    levelled = (n for n in graph.nodes if n.name in plan.actions)
    every = ((n, a) for n in levelled for a in n.all_input_nodes)
    return next((n for n, a in every if _holds(a, plan.dims(a.name), sizes)), None)


def _holds(node: fx.Node, shape: Sequence[Dim], sizes: Sequence[int]) -> bool:
    """Tell whether a nested dim of a value may hold a size of an input."""
    known = node.meta.get("open", ())
    # A value that was rewritten may have other dims than the one that was captured.
    is_open = known if len(known) == len(shape) else [True] * len(shape)
    nested = (dim for dim, asks in zip(shape, is_open, strict=True) if asks and is_nested(dim))
    whole = [factor for dim in nested for factor in dim if isinstance(factor, int)]
    return any(factor % size == 0 for factor in whole for size in sizes)


def _has_levels(graph: fx.Graph, root: nn.Module, flat: Sequence[torch.Tensor]) -> bool:
    try:
        run(graph, root, flat)
    except RunsError:
        return False
    except Failed:  # it is no matter of levels
        return True
    return True


def _together(example: Example) -> tuple[list[object], str]:
    """Return the flat outputs of every size of a masked doll from its one pass, or why it fails.

    Nothing in sliced nesting: there each size is a pass of its own.
    """
    plan = example.doll.plan
    if not plan.masked:
        return [], ""
    try:
        out = example.own(*range(plan.levels))
    except Failed as error:
        return [], _told(example.doll, error)
    count = len(out) // plan.levels
    return [out[i * count : (i + 1) * count] for i in range(plan.levels)], ""


def _failure(example: Example, level: int, together: list[object]) -> str:
    """Return what is wrong with a size on the example, "" if nothing is."""
    doll = example.doll
    try:
        error = _error(example, level, together)
    except (MatryoshkafyError, *Failed) as error:
        check_sizes(example.graphs)  # says it better, where an op has another size than planned
        said = error if isinstance(error, MatryoshkafyError) else _told(doll, error)
        return f"cannot be computed on the example: {said}"
    if error <= tolerance_of(doll) or _draws(doll) or _is_rounding(example, level):
        return ""
    return f"is not what its slice computes on the example: {_where(example, level, error)}"


def _error(example: Example, level: int, together: list[object]) -> float:
    own = together[level] if together else example.own(level)
    if level == example.doll.plan.levels - 1:
        return 0.0
    return relative_error(own, run(*example.cut(level), example.seen))


def _as_traced(trace: Trace, flat: Sequence[torch.Tensor]) -> bool:
    """Tell whether the example has the sizes that its trace was made with."""
    holes = trace.graph.find_nodes(op="placeholder")
    return all(tensor_info(n).shape == tuple(t.shape) for n, t in zip(holes, flat, strict=True))


def _draws(doll: Doll) -> bool:
    """Tell whether a masked trunk draws noise of a width: a slice may draw other numbers."""
    return doll.plan.masked and any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and (not op_of(node).training or bound_args(node).get(op_of(node).training) is True)
        and any(is_nested(dim) for shape in doll.plan.outputs(node.name) for dim in shape)
        for node in trace_of(doll).graph.nodes
    )


def _is_rounding(example: Example, level: int) -> bool:
    """In float64 two ways of computing one thing agree, whatever they round to in float32."""
    try:
        wide = Example(*doubled(example.doll, example.flat), example.graphs)
        return _error(wide, level, []) <= TOLERANCE[torch.float64]
    except Failed:
        return False


def _told(doll: Doll, error: Exception) -> str:
    """Return the first line of an error with the user's line that it came from."""
    found = EXECUTING.search(str(error))
    return f"{first_line(error)}{_line(doll, found.group(1)) if found else ''}"


def _where(example: Example, level: int, error: float) -> str:
    """Name the first value of the trunk that differs, or the output."""
    doll, first = example.doll, next(_differing(example, level), "")
    what = f"the value {first!r}{_line(doll, first)}" if first else "the output"
    return f"{what} is off by {error:.1e} (at most {tolerance_of(doll):g} expected)"


def _differing(example: Example, level: int) -> Iterator[str]:
    doll, plan = example.doll, example.doll.plan
    if not plan.masked:
        return
    full = values_of(full_graph(trace_of(doll), plan), root_of(doll), example.flat)
    mine = values_of(*example.cut(level))
    for name, a, b in prefixes(plan, level, full, mine):
        if relative_error(a, b) > tolerance_of(doll):
            yield name


def _line(doll: Doll, name: str) -> str:
    node = next((n for n in trace_of(doll).graph.nodes if n.name == name), None)
    if node is None:
        return ""
    return f" ({op_key(node)} at {node.meta.get('source') or 'an unknown line'})"
