"""Graph and plan become the graphs of a doll and of its sub-models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.guards import Size
from matryoshkafy.graph.signature import Signature
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.actions import ACTIONS
from matryoshkafy.rewrite.codegen import CallCodeGen
from matryoshkafy.rewrite.writer import Rewriter


@dataclass(frozen=True)
class Graphs:
    """The graphs of a plan, each written once for all who look at them: writing one takes as long
    as running it at a small size.
    """

    trace: Trace
    plan: Plan
    _written: dict[tuple[int, ...] | int, fx.Graph] = field(
        default_factory=dict[tuple[int, ...] | int, fx.Graph], compare=False, repr=False
    )

    def outputs(self, levels: tuple[int, ...]) -> fx.Graph:
        """Return the graph of the outputs of several levels, one flat list after the other."""
        if levels not in self._written:
            self._written[levels] = outputs_graph(self.trace, self.plan, list(levels))
        return self._written[levels]

    def sub(self, level: int) -> fx.Graph:
        """Return the standalone graph of a level."""
        if level not in self._written:
            self._written[level] = sub_graph(self.trace, self.plan.up_to(level), level)
        return self._written[level]


def sub_graph(trace: Trace, plan: Plan, level: int) -> fx.Graph:
    """Return the standalone graph of a level: parameters are already cut (and masked)."""
    narrow = replace(trace, signature=_narrow_signature(trace, plan, level))
    writer = Rewriter(narrow, plan, ACTIONS, top=level, standalone=True)
    return writer.finish([level])


def _narrow_signature(trace: Trace, plan: Plan, level: int) -> Signature:
    """Return the call of a sub-model: where the axis of an input nests, it is given the prefix."""
    widths = plan.ladder[level]
    holes = [n.name for n in trace.graph.nodes if n.op == "placeholder"]
    sizes = {
        Size(leaf, d): dims.size_at(axis, widths)
        for leaf, name in enumerate(holes)
        for d, axis in enumerate(plan.dims(name))
        if dims.is_nested(axis)
    }
    return replace(trace.signature, guards=trace.signature.guards.resized(sizes))


def full_graph(trace: Trace, plan: Plan) -> fx.Graph:
    """Return the graph of the doll's own call, at full size."""
    return Rewriter(trace, plan, ACTIONS).finish([plan.levels - 1])


def outputs_graph(trace: Trace, plan: Plan, levels: list[int]) -> fx.Graph:
    """Return the graph of the outputs of several levels, one flat list after the other."""
    graph = Rewriter(trace, plan, ACTIONS).finish(levels)
    graph.set_codegen(CallCodeGen(trace.signature, flat=True))
    return graph
