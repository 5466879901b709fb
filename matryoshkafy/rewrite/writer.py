"""Graph + plan -> the graphs of a doll and of its sub-models.

One `Rewriter` writes nodes at a level. At the last level of a masked plan this is the masked model;
at a lower level it is a sub-model; the tail is written once per level over prefixes of the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Widths
from matryoshkafy.graph.nodes import (
    bound_args,
    gives_several,
    is_item,
    is_op,
    outputs_of,
    set_arg,
    tensor_info,
)
from matryoshkafy.graph.paths import CHECKS, checks_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.kernels import ops as _ops
from matryoshkafy.plan.held import is_reparametrised
from matryoshkafy.plan.plan import Action, Plan, Scalar
from matryoshkafy.plan.stored import baked_name
from matryoshkafy.rewrite.codegen import CallCodeGen
from matryoshkafy.rewrite.resize import exchanged, resize
from matryoshkafy.rules import op_of

aten = torch.ops.aten
nested = torch.ops.matryoshkafy
assert _ops

# The index of a size in the ladder; None is before any cut, where inputs, the parameters of a live
# graph and the statistics that are taken at full width stand.
Level = int | None
Key = tuple[fx.Node, Level]


Write = Callable[["Rewriter", fx.Node, int, Action], fx.Node]
Actions = Mapping[str, Write]


class Rewriter:
    """Writes nodes of the user's graph at levels into a new graph; each (node, level) once.

    `top` is the level at which the trunk is computed: the largest, or that of a sub-model. With
    `standalone` parameters were cut beforehand; else a lower level reads slices of live ones.
    """

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        actions: Actions,
        *,
        top: int | None = None,
        standalone: bool = False,
    ) -> None:
        self.trace, self.plan, self.actions = trace, plan, actions
        self.standalone = standalone
        self.graph = fx.Graph()
        self.graph.set_codegen(CallCodeGen(trace.signature))
        self.written: dict[Key, Any] = {}
        self.top = plan.levels - 1 if top is None else top
        self.full = tuple(group.size for group in plan.groups)

    def finish(self, levels: list[int]) -> fx.Graph:
        """Write the outputs of the levels and return the graph."""
        self._inputs()
        self._checks(levels)
        outputs = list(enumerate(outputs_of(self.trace.graph)))
        return self._finished([self._output(i, v, level) for level in levels for i, v in outputs])

    def finish_values(self, values: list[fx.Node | None], level: int) -> fx.Graph:
        """Write values at a level and return the graph of them; in masked nesting all sizes read
        them.
        """
        self._inputs()
        self._checks(list(range(level + 1)) if self.plan.masked else [level])
        return self._finished([self.at(v, level) for v in values])

    def _inputs(self) -> None:
        for node in self.trace.graph.find_nodes(op="placeholder"):
            self._put(node, None, self.graph.placeholder(str(node.target)))

    def _checks(self, levels: list[int]) -> None:
        """Write what must hold of values on a recorded path, whatever is asked for."""
        for node, level in product(checks_of(self.trace.graph), levels):
            self.at(node, level)

    def _finished(self, flat: list[Any]) -> fx.Graph:
        self.graph.output(flat)
        ends = ("placeholder", "output")
        if any(not n.users and n.op not in ends for n in self.graph.nodes):
            self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def _output(self, position: int, value: object, level: int) -> Any:
        if not isinstance(value, fx.Node):
            return value
        written = self.at(value, level)
        extra = self.plan.notes.get("output", {}).get(str(position))
        if extra is None:
            return written
        segments = dims.relative(extra, self.full, self.plan.ladder[level])
        if segments is None:
            return written
        prefix = self.cut_dim(written, len(tensor_info(value).shape) - 1, segments)
        return self._unit(prefix) if str(position) in self.plan.notes.get("unit", {}) else prefix

    def _unit(self, value: fx.Node) -> fx.Node:
        """A prefix of a vector of length 1 is no such vector until it is normalised again."""
        call = self.graph.call_function
        norm = call(aten.linalg_vector_norm.default, (value, 2, [-1], True))
        return call(aten.div.Tensor, (value, call(aten.clamp_min.default, (norm, 1e-12))))

    # Values.

    def at(self, node: object, level: int) -> Any:
        """Return the value of an old node at a level, writing whatever it needs."""
        if not isinstance(node, fx.Node):
            return node
        for needed in _needed(node, level, self):
            if needed not in self.written:
                self.written[needed] = self._write(*needed)
        return self.written[self.key(node, level)]

    def given(self, node: fx.Node, level: int) -> dict[str, Any]:
        """Return the node's arguments by name, values as they are written at a level."""
        return {
            name: self.written[self.key(value, level)] if isinstance(value, fx.Node) else value
            for name, value in bound_args(node).items()
        }

    def key(self, node: fx.Node, level: Level) -> Key:
        """Return at which level a node is written where `level` is asked for."""
        if node.op != "placeholder":
            return node, level
        freed = any(map(dims.is_nested, self.plan.dims(node.name)))
        return node, (level if freed else None)

    def _trunk(self, node: fx.Node) -> bool:
        """A trunk value of a masked doll is computed once, at the top, and read by prefix."""
        return (
            self.plan.masked
            and node.op == "call_function"
            and node.name not in self.plan.tail
            and node.target not in CHECKS
            and self.kind(node) != "inner"
        )

    def kind(self, node: fx.Node) -> str:
        """Return what masked nesting does at a node, "" where it is nothing."""
        action = self.plan.actions.get(node.name) if self.plan.masked else None
        return action.kind if action else ""

    def sources(self, node: fx.Node, level: Level) -> list[Key]:
        """Return what must be written before (node, level)."""
        if self._cut_from_full(node, level):
            return [] if self.standalone else [(node, None)]
        if self._trunk(node) and level not in (self.top, None):
            return [(node, self.top)]
        # Each level's block is computed from what that level has, so all of them are needed.
        below = range(level) if level is not None and self.kind(node) == "blocks" else ()
        inputs = [n for n in node.all_input_nodes if not self._left_out(n, node, level)]
        return [self.key(n, at) for at in (*below, level) for n in inputs]

    def _left_out(self, value: fx.Node, reader: fx.Node, level: Level) -> bool:
        """Tell whether a value has no units at a level, and is only laid beside others there."""
        if level is None or not self.plan.stairs or not op_of(reader).joins:
            return False
        return self.plan.is_gone(self.plan.dims(value.name), level)

    def _cut_from_full(self, node: fx.Node, level: Level) -> bool:
        # Of g v / |v| a sub-model holds v and g, cut, and computes its weight as the user's class.
        if node.name not in self.plan.full or level is None:
            return False
        return not (self.standalone and is_reparametrised(node))

    def _write(self, node: fx.Node, level: Level) -> Any:
        if node.op == "get_attr":
            return self._state(node, level)
        if node.op == "placeholder":
            return self._input(node, level)
        if level is not None and self._cut_from_full(node, level):
            if self.standalone:
                return self._put(
                    node, level, self.graph.create_node("get_attr", baked_name(node.name))
                )
            return self._cut_value(node, None, level)
        if level is not None and level != self.top and self._trunk(node):
            return self._cut_value(node, self.top, level)
        return self._put(node, level, self._apply(node, level))

    def _input(self, node: fx.Node, level: Level) -> Any:
        """An input whose axis the user freed: a sub-model takes its prefix, a doll cuts it."""
        if level is None or level == self.top:
            return self.written[node, None]
        return self._cut_value(node, None, level)

    def _put(self, node: fx.Node, level: Level, new: fx.Node) -> fx.Node:
        new.meta = {k: node.meta[k] for k in ("source",) if k in node.meta}
        new.meta["origin"] = (node.name, level)
        self.written[node, level] = new
        return new

    def _cut_value(self, node: fx.Node, have: Level, want: int) -> Any:
        value = self.written[node, have]
        widths = self.plan.ladder[want]
        return value if gives_several(node) else self.cut(value, self.plan.dims(node.name), widths)

    def cut(self, value: fx.Node, shape: tuple[Dim, ...], widths: Widths) -> fx.Node:
        """Return the part of a value that is kept at the given widths."""
        for i, dim in enumerate(shape):
            value = self.narrow(value, i, dim, (self.plan.ladder[self.top], widths))
        return value

    def narrow(self, value: fx.Node, at: int, dim: Dim, widths: tuple[Widths, Widths]) -> fx.Node:
        """Return the part of one dim of a value that is kept, from the one widths to the other.

        A factor beside the nested ones may be the batch, of which a graph knows no number: the dim
        is taken apart there. Those of a parameter are numbers.
        """
        have, want = widths
        segments = dims.relative(dim, have, want)
        if segments is None:
            return value
        before = isinstance(dim[0], int)
        rest = dim[1:] if before else dim[:-1]
        if value.op == "get_attr" or not rest or not (before or isinstance(dim[-1], int)):
            return self.cut_dim(value, at, segments)
        inner, size = dims.relative(rest, have, want), dims.size_at(rest, have)
        sizes = [-1, size] if before else [size, -1]
        apart = self.graph.call_function(aten.unflatten.int, (value, at, sizes))
        cut = self.cut_dim(apart, at + 1 if before else at, inner or ())
        return self.graph.call_function(aten.flatten.using_ints, (cut, at, at + 1))

    def cut_dim(self, value: fx.Node, dim: int, segments: dims.Segments) -> fx.Node:
        call = self.graph.call_function
        parts = [call(aten.slice.Tensor, (value, dim, a, b)) for a, b in segments]
        return parts[0] if len(parts) == 1 else call(aten.cat.default, (parts, dim))

    def _state(self, node: fx.Node, level: Level) -> Any:
        known = self.written.get((node, None))
        if known is None:
            known = self._attribute(node)
        if level is None or (self.standalone and level == self.top):
            return known
        widths = self.plan.ladder[level]
        return self.cut(known, self.plan.parameters.get(str(node.target), ()), widths)

    def _attribute(self, node: fx.Node) -> fx.Node:
        # get_attr() warns of a name that no module holds yet; the module is made from the graph.
        return self._put(node, None, self.graph.create_node("get_attr", str(node.target)))

    # Nodes.

    def _apply(self, node: fx.Node, level: Level) -> fx.Node:
        if is_item(node) and isinstance(node.args[0], fx.Node):
            return self.copy(node, level, resized=False)
        action = self.plan.actions.get(node.name)
        if action is None or level is None or not self.plan.masked:
            return self.copy(node, level)
        return self.actions[action.kind](self, node, level, action)

    def call(self, node: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """Return a new call that has the name of a node of the user's graph."""
        return self.graph.create_node("call_function", target, args, kwargs or {}, node.name)

    def copy_args(self, node: fx.Node, level: Level) -> tuple[Any, Any]:
        """Return the node's arguments at a level."""
        args = node.args
        if self.plan.stairs and op_of(node).joins:
            given: Any = args[0]
            args = ([n for n in given if not self._left_out(n, node, level)], *args[1:])
        return fx.map_arg((args, node.kwargs), lambda n: self.written[self.key(n, level)])

    def copy(self, node: fx.Node, level: Level, *, resized: bool = True) -> fx.Node:
        args, kwargs = self.copy_args(node, level)
        new = self.call(node, node.target, args, kwargs)
        if resized and level is not None:
            if is_op(node):
                resize(self.plan, self.plan.ladder[level], node, new)
            self._rescale(node, level, new)
        for name in op_of(node).contiguous:
            with self.graph.inserting_before(new):
                set_arg(new, name, fx.map_arg(bound_args(new)[name], self._without_gaps))
        return new

    def _without_gaps(self, value: fx.Node) -> fx.Node:
        """Copy what was cut into a block of its own."""
        cut = value.target is aten.slice.Tensor
        return self.graph.call_function(aten.contiguous.default, (value,)) if cut else value

    def _rescale(self, node: fx.Node, level: int, new: fx.Node) -> None:
        for scalar in self.plan.scalars:
            if scalar.node == node.name:
                width = self.plan.ladder[level][scalar.group]
                value = self._constant(node, new, scalar, width)
                if scalar.argument.isdecimal():
                    new.update_arg(int(scalar.argument), value)
                else:
                    set_arg(new, scalar.argument, value)

    def _constant(self, node: fx.Node, new: fx.Node, scalar: Scalar, width: int) -> Any:
        """A tensor of one element stays a tensor: pow of two tensors takes no number; of a count
        the width is a factor.
        """
        value = scalar.at(width)
        if scalar.form not in ("alibi", "count"):
            return value
        with self.graph.inserting_before(new):
            old = new.args[int(scalar.argument)]
            if scalar.form == "count":
                return (
                    old
                    if width == scalar.units
                    else exchanged(self.graph, old, scalar.units, width)
                )
            return self.graph.call_function(aten.full_like.default, (old, value))

    def runs(self, dim: Dim, level: int) -> list[int]:
        """Return the level of each index of a dim, run-length coded."""
        return list(dims.runs(dim, self.plan.ladder[: level + 1]))


def _needed(node: fx.Node, level: Level, writer: Rewriter) -> list[Key]:
    """Return (node, level) and what it needs, inputs first, without recursion."""
    # A graph of a thousand layers is deeper than Python's stack.
    order: list[Key] = []
    stack: list[tuple[Key, bool]] = [(writer.key(node, level), False)]
    seen: set[Key] = set()
    while stack:
        key, done = stack.pop()
        if done:
            order.append(key)
        elif key not in seen and key not in writer.written:
            seen.add(key)
            stack.append((key, True))
            stack.extend((k, False) for k in reversed(writer.sources(*key)))
    return order
