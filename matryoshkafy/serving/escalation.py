"""What a size adds to the one below it: graphs that compute the new columns alone.

In masked nesting the values of a small size are a prefix of the larger one's (law 2), so a value at
level j is what it was at level j - 1 with the new units beside it. One level at a time nothing
needs a mask: the new rows of a weight read every column up to their level, a norm in blocks takes
its statistics over the new units alone, attention runs over the new heads.

    whole   a value at the level, old and new units in their natural order
    part    its new units alone
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Segments, Widths
from matryoshkafy.graph.nodes import Argument, is_tensor, op_key, outputs_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.resize import resize
from matryoshkafy.rules.weights import weight_places
from matryoshkafy.serving.vectors import ServingError

aten = torch.ops.aten
WHOLE, PART = "whole", "part"
Key = tuple[fx.Node, str]
CACHE = "cache_"


@dataclass(frozen=True)
class Step:
    """A graph of flat tensors: the user's inputs, then cached values; then what it returns.

    Args:
        graph: the graph.
        reads: what it takes behind the inputs: `cache_NODE`, the value of a node.
        returns: what it gives, named likewise (empty for an answer).
    """

    graph: fx.Graph
    reads: tuple[str, ...]
    returns: tuple[str, ...]


def answer(writer: Writer) -> Step:
    """Return the graph of the outputs of a level, from cached values of its trunk."""
    return writer.finish(outputs_of(writer.trace.graph), ())


def grow(writer: Writer, names: Iterable[str]) -> Step:
    """Return the graph that computes values of a level, from cached ones of the level below.

    Args:
        names: what later steps read, `cache_NODE`; other names are passed over.
    """
    by_name = {CACHE + node.name: node for node in writer.trace.graph.nodes}
    nodes = [by_name[name] for name in sorted(names) if name in by_name]
    if writer.old >= 0:
        nodes = [node for node in nodes if writer.grows(node)]
    return writer.finish(nodes, tuple(CACHE + node.name for node in nodes))


class Writer:
    """Writes nodes of the user's graph into a step, each at most once whole and once as a part.

    Args:
        levels: (level that is cached, level to write); -1 where nothing is cached; twice the same
            level where the trunk of that level is.
    """

    def __init__(self, trace: Trace, plan: Plan, levels: tuple[int, int]) -> None:
        self.trace, self.plan = trace, plan
        self.old, self.level = levels
        self.full, self.widths = plan.ladder[-1], plan.ladder[self.level]
        nothing = (0,) * len(self.full)
        self.before: Widths = plan.ladder[self.old] if self.old >= 0 else nothing
        self.delta: Widths = tuple(w - b for w, b in zip(self.widths, self.before, strict=True))
        self.graph = fx.Graph()
        self.written: dict[Key, Any] = {}
        self.holes: dict[str, fx.Node] = {}
        self.extra: dict[str, fx.Node] = {}

    def finish(self, values: Sequence[Argument], returns: tuple[str, ...]) -> Step:
        """Write the values whole and return the step."""
        inputs = [n for n in self.trace.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            self.written[node, WHOLE] = self.graph.placeholder(str(node.target))
        self.last = self.written[inputs[-1], WHOLE] if inputs else None
        given = [self.at(v, WHOLE) if isinstance(v, fx.Node) else v for v in values]
        self.graph.output([*given, *self.extra.values()])
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return Step(self.graph, tuple(self.holes), (*returns, *self.extra))

    # What a node is.

    def shapes(self, node: fx.Node) -> tuple[tuple[Dim, ...], ...]:
        """Return the dims of each output of a node."""
        return self.plan.outputs(node.name)

    def grows(self, node: fx.Node) -> bool:
        """Tell whether a value of the trunk has units at this level that the one below lacks."""
        return any(
            dims.size_at(dim, self.widths) != dims.size_at(dim, self.before)
            for shape in self.shapes(node)
            for dim in shape
            if dims.is_nested(dim)
        )

    def _by_parts(self, node: fx.Node) -> bool:
        """Tell whether the new units of a node come from the new units of its inputs."""
        one = all(sum(map(dims.is_nested, shape)) == 1 for shape in self.shapes(node))
        return self.old >= 0 and one and self._kind(node) != "clamp"

    def _kind(self, node: fx.Node) -> str:
        action = self.plan.actions.get(node.name)
        return action.kind if action else ""

    def known(self, node: fx.Node) -> bool:
        """Tell whether a value of the trunk is the cached one: it does not grow."""
        trunk = is_tensor(node) and node.op == "call_function" and node.name not in self.plan.tail
        return trunk and self.old >= 0 and not self.grows(node) and bool(node.all_input_nodes)

    # The walk, inputs first, without recursion.

    def at(self, node: fx.Node, how: str) -> Any:
        """Return a value, writing whatever it needs."""
        for key in self._needed((node, how)):
            if key not in self.written:
                self.written[key] = self.write(*key)
        return self.written[node, how]

    def _needed(self, wanted: Key) -> Iterator[Key]:
        stack: list[tuple[Key, bool]] = [(wanted, False)]
        seen: set[Key] = set()
        while stack:
            key, done = stack.pop()
            if done:
                yield key
            elif key not in seen and key not in self.written:
                seen.add(key)
                stack.append((key, True))
                stack.extend((k, False) for k in self.sources(*key))

    def sources(self, node: fx.Node, how: str) -> list[Key]:
        if node.op != "call_function" or self.known(node):
            return []
        if how == WHOLE and self._merges(node):
            return [(node, PART)]
        if how == WHOLE:
            return [(n, WHOLE) for n in node.all_input_nodes]
        if not self._by_parts(node):
            return [(node, WHOLE)]
        return [(n, self.role(node, n)) for n in node.all_input_nodes]

    def _merges(self, node: fx.Node) -> bool:
        """Tell whether a whole value is the cached units and the new ones; several are not one."""
        one = len(self.shapes(node)) == 1
        return one and self._by_parts(node) and node.name not in self.plan.tail

    def role(self, node: fx.Node, value: fx.Node) -> str:
        """Return how a node that is written as a part reads one of its inputs."""
        if not any(map(dims.is_nested, (d for s in self.shapes(value) for d in s))):
            return WHOLE
        if self._kind(node) == "mask":
            return PART if self._is_bias(node, value) else WHOLE
        prefix = self.plan.options.norm == "prefix" and self._kind(node) in ("norm", "level")
        return WHOLE if prefix else PART

    def _is_bias(self, node: fx.Node, value: fx.Node) -> bool:
        return value.op == "get_attr" and value not in weight_places(node)

    # Values.

    def write(self, node: fx.Node, how: str) -> Any:
        if node.op == "get_attr":
            return self._state(node, how)
        if self.known(node):
            return self._cache(node)
        if how == WHOLE and self._merges(node):
            return self._merged(node)
        if how == PART and not self._by_parts(node):
            return self.new_units(self.written[node, WHOLE], self.shapes(node)[0])
        if node.name in self.plan.full:
            raise ServingError(
                f"{_place(node)}: a statistic of parameters that is held at full width cannot be "
                "extended from size to size; compute each size by outputs() instead"
            )
        return self.call(node, how)

    def _cache(self, node: fx.Node) -> fx.Node:
        return self.hole(CACHE + node.name)

    def hole(self, name: str) -> fx.Node:
        """Return the placeholder of something that the step takes."""
        if name not in self.holes:
            with self.graph.inserting_after(self.last):
                self.last = self.graph.placeholder(name)
            self.holes[name] = self.last
        return self.holes[name]

    def _state(self, node: fx.Node, how: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = self.graph.get_attr(str(node.target))
        shape = self.plan.parameters.get(str(node.target), ())
        for i, dim in enumerate(shape):
            value = self.kept(value, i, dims.relative(dim, self.full, self.widths))
        return self.new_units(value, shape) if how == PART else value

    def new_units(self, value: fx.Node, shape: tuple[Dim, ...]) -> fx.Node:
        """Return the units of a whole value that the level below lacks."""
        for i, dim in enumerate(shape):
            value = self.kept(value, i, self._new(dim))
        return value

    def _new(self, dim: Dim) -> Segments | None:
        if not dims.is_nested(dim):
            return None
        old = dims.relative(dim, self.widths, self.before) if any(self.before) else ()
        return _complement(old, dims.size_at(dim, self.widths))

    def kept(self, value: fx.Node, dim: int, segments: Segments | None) -> fx.Node:
        if segments is None:
            return value
        call = self.graph.call_function
        pieces = [call(aten.slice.Tensor, (value, dim, a, b)) for a, b in segments]
        return pieces[0] if len(pieces) == 1 else call(aten.cat.default, (pieces, dim))

    def _merged(self, node: fx.Node) -> Any:
        """Return the cached units and the new ones, in their natural order."""
        (shape,) = self.shapes(node)
        at = next(i for i, dim in enumerate(shape) if dims.is_nested(dim))
        call = self.graph.call_function
        new = self._new(shape[at])
        old = self._cache(node)
        if not new:
            return old
        part = self.written[node, PART]
        joined = call(aten.cat.default, ([old, part], at))
        order = _order(new, dims.size_at(shape[at], self.widths))
        pieces = [call(aten.slice.Tensor, (joined, at, a, b)) for a, b in order]
        return (
            joined
            if len(pieces) == 2 and order[0][0] == 0
            else call(aten.cat.default, (pieces, at))
        )

    # Nodes.

    def call(self, node: fx.Node, how: str) -> Any:
        self._check(node, how)
        parts = how == PART
        roles = {n: self.role(node, n) if parts else WHOLE for n in node.all_input_nodes}
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._operand(node, n, roles[n], how)
        )
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        prefix = parts and self.plan.options.norm == "prefix"
        if hasattr(node.target, "_schema"):
            whole = not parts or (prefix and self._kind(node) == "norm")
            resize(self.plan, self.widths if whole else self.delta, node, new)
        if prefix and self._kind(node) == "norm":
            return self.new_units(new, self.shapes(node)[0])
        if self._kind(node) == "level":
            return self._widened(node, new, self.delta if parts else self.widths)
        return new

    def _operand(self, node: fx.Node, value: fx.Node, role: str, how: str) -> Any:
        operand = self.written[value, role]
        weight = weight_places(node).get(value) if self._kind(node) == "mask" else None
        if how != PART or weight is None:
            return operand
        (shape,) = self.shapes(value)
        for out in weight.outs:
            operand = self.kept(operand, out, self._new(shape[out]))
        return operand

    def _widened(self, node: fx.Node, value: fx.Node, widths: Widths) -> fx.Node:
        """A statistic of one level holds for each of its units."""
        (shape,) = self.shapes(node)
        sizes = [dims.size_at(dim, widths) if dims.is_nested(dim) else -1 for dim in shape]
        return self.graph.call_function(aten.expand.default, (value, sizes))

    def _check(self, node: fx.Node, how: str) -> None:
        """Refuse what has no new columns of its own."""
        kind = self._kind(node)
        mixes = kind in ("mask", "norm", "level") and node.name not in self.plan.tail
        if mixes and how == WHOLE and self.old >= 0:
            raise ServingError(
                f"{_place(node)}: {op_key(node)} grows along two dims at once, so its "
                "new units are no block of their own; compute each size by outputs() instead"
            )
        if kind == "mask" and how == PART and len(_weights(node)) != 1:
            raise ServingError(
                f"{_place(node)}: {op_key(node)} computes all units in one recurrence, so its new "
                "units cannot be computed alone; compute each size by outputs() instead"
            )
        if kind == "clamp" and self.grows(node):
            raise ServingError(
                f"{_place(node)}: {op_key(node)} reads the smallest size only and makes units of "
                "another width, which cannot be extended; compute each size by outputs() instead"
            )


def _weights(node: fx.Node) -> list[fx.Node]:
    return [n for n, place in weight_places(node).items() if place.into]


def _place(node: fx.Node) -> str:
    return node.meta.get("source") or node.name


def _complement(segments: Segments | None, size: int) -> Segments:
    """Return what segments leave of 0..size; None keeps all of it."""
    if segments is None:
        return ()
    out: list[tuple[int, int]] = []
    at = 0
    for a, b in (*segments, (size, size)):
        if a > at:
            out.append((at, a))
        at = b
    return tuple(out)


def _order(new: Segments, size: int) -> Segments:
    """Return the pieces of [old | new] that, laid one after the other, stand in natural order."""
    old = _complement(new, size)
    behind = sum(b - a for a, b in old)
    starts: dict[int, tuple[int, int]] = {}
    for group, start in ((old, 0), (new, behind)):
        for a, b in group:
            starts[a] = (start, start + b - a)
            start += b - a
    return tuple(starts[a] for a in sorted(starts))
