"""What a size adds to the one below it: graphs that compute the new columns alone.

In masked nesting the values of a small size are a prefix of the larger one's (law 2), so a value at
level j is what it was at level j - 1 with the new units beside it. One level at a time nothing
needs a mask: the new rows of a weight read every column up to their level, a norm in blocks takes
its statistics over the new units alone, attention runs over the new heads.

    whole   a value at the level, old and new units in their natural order
    part    its new units alone
    pieces  the parts of all levels up to this one, side by side: nothing is copied

What a later level reads is kept as parts, too, and a linear layer adds up what each part gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Segments, Widths
from matryoshkafy.graph.nodes import Argument, bound_args, is_tensor, op_key, outputs_of
from matryoshkafy.graph.paths import checks_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.resize import resize
from matryoshkafy.rules.weights import weight_places
from matryoshkafy.serving.pieces import order_of, summed
from matryoshkafy.serving.vectors import ServingError

aten = torch.ops.aten
WHOLE, PART, PIECES = "whole", "part", "pieces"
Key = tuple[fx.Node, str]
CACHE = "cache_"


@dataclass(frozen=True)
class Step:
    """A graph of flat tensors: the user's inputs, then cached values; then what it returns.

    Args:
        graph: the graph.
        reads: what it takes behind the inputs: `cache_NODE`, the value of a node, or
            `cache_LEVEL_NODE`, what a level added to it.
        returns: what it gives, named likewise (empty for an answer).
    """

    graph: fx.Graph
    reads: tuple[str, ...]
    returns: tuple[str, ...]


def answer(writer: Writer) -> Step:
    """Return the graph of the outputs of a level, from cached values of its trunk."""
    return writer.finish([(value, WHOLE) for value in outputs_of(writer.trace.graph)], ())


def grow(writer: Writer, names: Iterable[str]) -> Step:
    """Return the graph that computes values of a level, from cached ones of the levels below.

    Args:
        names: what later steps read; those of other levels are passed over.
    """
    mine = {writer.cached_name(n): n for n in writer.trace.graph.nodes if writer.adds(n)}
    given = sorted(set(names) & set(mine))
    how = [PART if writer.old >= 0 and writer.parted(mine[name]) else WHOLE for name in given]
    return writer.finish(
        [(mine[name], h) for name, h in zip(given, how, strict=True)], tuple(given)
    )


def node_of(name: str) -> str:
    """Return the name of the node whose cached value or part has this name."""
    level, _, rest = name.removeprefix(CACHE).partition("_")
    return rest if level.isdecimal() else name.removeprefix(CACHE)


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

    def finish(self, values: Sequence[tuple[Argument, str]], returns: tuple[str, ...]) -> Step:
        """Write values, whole or in part, and return the step."""
        inputs = [n for n in self.trace.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            self.written[node, WHOLE] = self.graph.placeholder(str(node.target))
        self.last = self.written[inputs[-1], WHOLE] if inputs else None
        for check in () if returns else checks_of(self.trace.graph):
            self.at(check, WHOLE)
        given = [self.at(v, how) if isinstance(v, fx.Node) else v for v, how in values]
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
        return self._grew(node, self.before, self.widths)

    def adds(self, node: fx.Node) -> bool:
        """Tell whether this level has anything to remember of a node."""
        return self.old < 0 or self.grows(node)

    def _grew(self, node: fx.Node, before: Widths, widths: Widths) -> bool:
        return any(
            dims.size_at(dim, widths) != dims.size_at(dim, before)
            for shape in self.shapes(node)
            for dim in shape
            if dims.is_nested(dim)
        )

    def _levels(self, node: fx.Node) -> list[int]:
        """Return the levels, up to this one, that add units to a node."""
        ladder = ((0,) * len(self.full), *self.plan.ladder)
        return [i for i in range(self.level + 1) if self._grew(node, ladder[i], ladder[i + 1])]

    def _by_parts(self, node: fx.Node) -> bool:
        """Tell whether the new units of a node come from the new units of its inputs."""
        one = all(sum(map(dims.is_nested, shape)) == 1 for shape in self.shapes(node))
        return self.old >= 0 and one and self._kind(node) != "clamp"

    def parted(self, node: fx.Node) -> bool:
        """Tell whether a value is remembered as what each level added; several are not one."""
        shapes = self.shapes(node)
        one = len(shapes) == 1 and sum(map(dims.is_nested, shapes[0])) == 1
        trunk = node.op == "call_function" and node.name not in self.plan.tail
        return one and trunk and self._kind(node) != "clamp"

    def cached_name(self, node: fx.Node, level: int | None = None) -> str:
        """Return the name of a value, or of what a level (this one) added to it."""
        level = self.level if level is None else level
        return f"{CACHE}{level}_{node.name}" if self.parted(node) else CACHE + node.name

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
        if how == PIECES or how == WHOLE and self._merges(node):
            return [(node, PART)]
        if how == WHOLE:
            return [(n, WHOLE) for n in node.all_input_nodes]
        if not self._by_parts(node):
            return [(node, WHOLE)]
        return [(n, self.role(node, n)) for n in node.all_input_nodes]

    def _merges(self, node: fx.Node) -> bool:
        """Tell whether a whole value is the cached units and the new ones."""
        return self.old >= 0 and self.parted(node)

    def role(self, node: fx.Node, value: fx.Node) -> str:
        """Return how a node that is written as a part reads one of its inputs."""
        if not any(map(dims.is_nested, (d for s in self.shapes(value) for d in s))):
            return WHOLE
        if self._kind(node) == "mask":
            if value.op == "get_attr" and value not in weight_places(node):  # a bias
                return PART
            return PIECES if self._sums(node, value) else WHOLE
        prefix = self.plan.options.norm == "prefix" and self._kind(node) in ("norm", "level")
        return WHOLE if prefix else PART

    def _sums(self, node: fx.Node, value: fx.Node) -> bool:
        """Tell whether a node is a linear layer that can read the parts of its input one by one."""
        linear = node.target == aten.linear.default and node.args[0] is value
        stored = all(n.op == "get_attr" for n in node.all_input_nodes if n is not value)
        last = linear and stored and self.parted(value) and self.shapes(value)[0][-1]
        return bool(last) and dims.is_nested(last)

    # Values.

    def write(self, node: fx.Node, how: str) -> Any:
        if node.op == "get_attr":
            return self._state(node, how)
        if how == PIECES:
            return self._pieces(node)
        if self.known(node):
            return self._cache(node)
        if how == WHOLE and self._merges(node):
            return self._joined(node, self._pieces(node))
        if how == PART and not self._by_parts(node):
            return self.new_units(self.written[node, WHOLE], self.shapes(node)[0])
        if node.name in self.plan.full:
            raise ServingError(
                f"{_place(node)}: a statistic of parameters that is held at full width cannot be "
                "extended from size to size; compute each size by outputs() instead"
            )
        return self.call(node, how)

    def _cache(self, node: fx.Node) -> fx.Node:
        if self.parted(node):
            return self._joined(node, self._pieces(node))
        return self.hole(CACHE + node.name)

    def _pieces(self, node: fx.Node) -> list[fx.Node]:
        """Return what each level added to a value, this one last."""
        levels = [i for i in self._levels(node) if i <= self.old]
        old = [self.hole(self.cached_name(node, level)) for level in levels]
        return old if self.known(node) else [*old, self.written[node, PART]]

    def hole(self, name: str) -> fx.Node:
        """Return the placeholder of something that the step takes."""
        if name not in self.holes:
            with self.graph.inserting_after(self.last):
                self.last = self.graph.placeholder(name)
            self.holes[name] = self.last
        return self.holes[name]

    def _state(self, node: fx.Node, how: str) -> Any:
        shape = self.plan.parameters.get(str(node.target), ())
        new = range(len(shape)) if how == PART else ()
        return self._rows(node, {dim: self._added(shape[dim]) for dim in new})

    def _rows(self, node: fx.Node, segments: Mapping[int, Segments | None]) -> fx.Node:
        """Return some segments of a parameter, and of its other dims what this level has."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = self.graph.get_attr(str(node.target))
        for i, dim in enumerate(self.plan.parameters.get(str(node.target), ())):
            kept = segments[i] if i in segments else dims.relative(dim, self.full, self.widths)
            value = self.kept(value, i, kept)
        return value

    def _added(self, dim: Dim) -> Segments | None:
        """Return the units that this level adds to a dim, counted in the full one."""
        if not dims.is_nested(dim):
            return None
        below = dims.kept(dim, self.before) if self.old >= 0 else ()
        return dims.minus(dims.kept(dim, self.widths), below)

    def new_units(self, value: fx.Node, shape: tuple[Dim, ...]) -> fx.Node:
        """Return the units of a whole value that the level below lacks."""
        for i, dim in enumerate(shape):
            value = self.kept(value, i, self._new(dim))
        return value

    def _new(self, dim: Dim) -> Segments | None:
        return self._between(dim, self.level) if dims.is_nested(dim) else None

    def _between(self, dim: Dim, level: int) -> Segments:
        """Return the units that a level adds to the one below, counted in this level's dim."""
        whole: Segments = ((0, dims.size_at(dim, self.widths)),)
        ladder = self.plan.ladder
        upper = dims.relative(dim, self.widths, ladder[level])
        lower = dims.relative(dim, self.widths, ladder[level - 1]) if level else ()
        return dims.minus(whole if upper is None else upper, whole if lower is None else lower)

    def kept(self, value: fx.Node, dim: int, segments: Segments | None) -> fx.Node:
        if segments is None:
            return value
        call = self.graph.call_function
        pieces = [call(aten.slice.Tensor, (value, dim, a, b)) for a, b in segments]
        return pieces[0] if len(pieces) == 1 else call(aten.cat.default, (pieces, dim))

    def _joined(self, node: fx.Node, pieces: list[fx.Node]) -> fx.Node:
        """Return the pieces of a value as one, in the natural order of its units."""
        (shape,) = self.shapes(node)
        at = next(i for i, dim in enumerate(shape) if dims.is_nested(dim))
        if len(pieces) == 1:
            return pieces[0]
        order = order_of([self._between(shape[at], i) for i in self._levels(node)])
        joined = self.graph.call_function(aten.cat.default, (pieces, at))
        return joined if len(order) == 1 else self.kept(joined, at, order)

    # Nodes.

    def call(self, node: fx.Node, how: str) -> Any:
        self._check(node, how)
        parts = how == PART
        roles = {n: self.role(node, n) if parts else WHOLE for n in node.all_input_nodes}
        if PIECES in roles.values():
            return self._summed(node)
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

    def _summed(self, node: fx.Node) -> fx.Node:
        """Return the new units of a linear layer, from the parts of its input."""
        value, weight, bias = bound_args(node).values()
        out, into = self.plan.parameters[str(weight.target)]
        rows = self._rows(weight, {0: self._added(out)})
        weights = [self.kept(rows, 1, self._between(into, i)) for i in self._levels(value)]
        given = self.written[bias, PART] if bias is not None else None
        return self.graph.call_function(summed, (self.written[value, PIECES], weights, given))

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
