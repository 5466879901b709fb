"""check_sizes(): the plan is obeyed; each node of every rewritten graph has the size it says.

The graphs run on tensors of the meta device, which hold no memory: milliseconds instead of a
forward. Layers that repeat are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Widths
from matryoshkafy.errors import PlanError, first_line
from matryoshkafy.graph.nodes import Info, TensorInfo, info_of, op_key, schema_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.stored import statistics
from matryoshkafy.rewrite.graphs import Graphs

REMEDY = (
    "Say in its row which argument is a size (mk.rule(..., sizes=...)) and which dims pass; or "
    "hold its axes whole with keep=[...]."
)


def check_sizes(graphs: Graphs) -> None:
    """Run every graph of a plan without memory and compare each node's size with the plan's.

    Raises:
        PlanError: a node has another size than the plan says, or cannot be computed at a size;
            it names the op, the user's line, what was found and expected, and what to do.
    """
    plan = graphs.plan
    checker = Checker(graphs.trace, plan)
    top = plan.levels - 1
    levels = tuple(range(plan.levels)) if plan.masked else (top,)
    checker.check(graphs.outputs(levels), checker.whole, top)
    # In sliced nesting the doll's own pass of a size has the nodes of its sub-model.
    for level in range(top):
        cut = {name: _sizes(kept.dims, plan.ladder[level]) for name, kept in plan.stored.items()}
        checker.check(graphs.sub(level), cut, level, standalone=True)


@dataclass(frozen=True)
class _Place:
    """A node of the user's graph that a rewritten node computes, at a level."""

    node: fx.Node
    level: int


class Checker:
    """Compares the sizes of what a plan's graphs compute with the plan's."""

    def __init__(self, trace: Trace, plan: Plan) -> None:
        self.trace, self.plan = trace, plan
        self.state = trace.state()
        self.whole = {name: tuple(t.shape) for name, t in self.state.items()}
        self.nodes = {n.name: n for n in trace.graph.nodes}
        self.sources = statistics(plan)
        self.known: dict[Hashable, object] = {}

    def check(
        self,
        graph: fx.Graph,
        shapes: Mapping[str, tuple[int, ...]],
        level: int,
        *,
        standalone: bool = False,
    ) -> None:
        """Run one graph over tensors of these shapes; what has no sizes there is left alone."""
        widths = self.plan.ladder[level if standalone else -1]
        values: dict[fx.Node, object] = {}
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "placeholder":
                    values[node] = self._input(node, widths)
                elif node.op == "get_attr":
                    values[node] = self._tensor(str(node.target), shapes)
                elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
                    self._run(node, values)

    def _input(self, node: fx.Node, widths: Widths) -> Tensor:
        info = info_of(self.nodes[node.meta["origin"][0]])
        assert isinstance(info, TensorInfo)
        planned = self.plan.dims(node.meta["origin"][0])
        return _empty(_sizes(planned, widths) if planned else info.shape, info.dtype)

    def _tensor(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor | bool:
        if name == "training":
            return False
        if name in self.state:
            own = self.state[name]
            shape = shapes.get(name, tuple(own.shape))
            if own.layout != torch.strided:
                return _sparse(shape, own.dtype, "meta")
            return _empty(shape, own.dtype)
        info = info_of(self.nodes[self.sources[name]])
        assert isinstance(info, TensorInfo)
        return _empty(shapes[name], info.dtype)

    def _run(self, node: fx.Node, values: dict[fx.Node, object]) -> None:
        place, own = self._place(node), "origin" in node.meta
        try:
            values[node] = _called(node, values.__getitem__, self._once)
        except Exception as error:  # noqa: BLE001  ops of any library run here
            if place is not None and (not own or self._follows(place.node)):
                raise PlanError(
                    self._text(place, f"fails: {type(error).__name__}: {first_line(error)}")
                ) from error
            return
        if place is not None and own:
            self._compare(place, values[node])

    def seen(self, node: fx.Node, value: object) -> str:
        """Return what is wrong with the size of a node of a graph that runs on the example."""
        place = self._place(node) if "origin" in node.meta else None
        try:
            if place is not None:
                self._compare(place, value)
        except PlanError as error:
            return str(error)
        return ""

    def _once(self, key: Hashable, compute: Callable[[], object]) -> object:
        """Return what an op gives for arguments of such shapes."""
        try:
            known = self.known.get(key)
        except TypeError:  # an argument that has no hash
            return compute()
        if known is None:
            known = self.known[key] = compute()
        return known

    def _place(self, node: fx.Node) -> _Place | None:
        """Return what a node computes; of a cut or a mask, what it is made for."""
        while "origin" not in node.meta and node.users:
            node = next(iter(node.users))
        name, level = node.meta.get("origin", ("", None))
        known = self.nodes.get(name)
        if known is None or known.op != "call_function" or level is None:
            return None
        return _Place(known, level)

    def _compare(self, place: _Place, value: object) -> None:
        shapes = self.plan.outputs(place.node.name)
        if not shapes:  # scope "output" plans no node
            return
        several = isinstance(value, (tuple, list))
        found_here = cast("Sequence[object]", value) if several else (value,)
        for i, each in enumerate(found_here):
            shape = shapes[i] if i < len(shapes) else ()
            if isinstance(each, Tensor) and (shape or not several):
                expected = _sizes(shape, self.plan.ladder[place.level])
                found, whole = tuple(int(n) for n in each.shape), _whole(place.node, i)
                if not _agree(found, expected, whole) and self._as_recorded(place.node, i, whole):
                    said = f"has the shape {list(found)}, the plan says {list(expected)}"
                    raise PlanError(self._text(place, said))

    def _as_recorded(self, node: fx.Node, output: int, whole: tuple[int, ...]) -> bool:
        """Tell whether an output has its recorded shape at full size: what an op leaves beside its
        result can depend on the device (embedding_bag).
        """
        value = self._at_full(node)
        several = isinstance(value, (tuple, list))
        given = cast("Sequence[object]", value)[output] if several else value
        return not isinstance(given, Tensor) or _agree(tuple(given.shape), whole, whole)

    def _follows(self, node: fx.Node) -> bool:
        """Tell whether a node can be computed so at full size, as the user's graph has it."""
        return self._at_full(node) is not None

    def _at_full(self, node: fx.Node) -> object | None:
        """Return what a node gives at full size; None where it cannot be computed so."""

        def full(value: fx.Node) -> object:
            info = info_of(value)
            return _like(info) if info is not None else self._tensor(str(value.target), self.whole)

        try:
            return _called(node, full)
        except Exception:  # noqa: BLE001  whatever an op raises, it cannot be followed
            return None

    def _text(self, place: _Place, said: str) -> str:
        node = place.node
        at = node.meta.get("source") or "an unknown line"
        return (
            f"at size {self.plan.sizes[place.level]}, {op_key(node)} ({node.name}) at {at} {said}. "
            + REMEDY
        )


def _word(value: object) -> Hashable:
    """Return all of an argument that the shape of a result depends on."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else None
        return value.layout, value.shape, strides, value.dtype
    if isinstance(value, (tuple, list)):
        parts = cast("Sequence[object]", value)
        return type(parts).__name__, tuple(map(_word, parts))
    if isinstance(value, dict):
        return tuple((n, _word(v)) for n, v in cast("dict[str, object]", value).items())
    return type(value), cast("Hashable", value)


def _called(
    node: fx.Node,
    value_of: Callable[[fx.Node], Any],
    once: Callable[[Hashable, Callable[[], object]], object] = lambda _, compute: compute(),
) -> object:
    """Compute a node over values of our own."""
    call = cast("Callable[..., object]", node.target)
    args, kwargs = cast("tuple[Any, Any]", fx.map_arg((node.args, node.kwargs), value_of))
    if _makes(call):
        kwargs = {**kwargs, "device": "meta"}
    return once((call, _word(args), _word(kwargs)), partial(_computed, call, args, kwargs))


@cache
def _makes(op: object) -> bool:
    """Tell whether an op is told where its tensor shall be."""
    given = schema_of(op).arguments if hasattr(op, "_schema") else ()
    return any(a.name == "device" and a.kwarg_only for a in given)


def _computed(call: Callable[..., object], args: Any, kwargs: Any) -> object:
    """Call an op without memory; what the meta device has no kernel for, on fake tensors.

    Fake tensors know more ops and speak of their device, and take several times as long.
    """
    try:
        return call(*args, **kwargs)
    except Exception:  # noqa: BLE001  ops of any library run here
        with FakeTensorMode():
            args, kwargs = pytree.tree_map_only(
                Tensor, partial(_moved, device="cpu"), (args, kwargs)
            )
            found = call(*args, **({"device": "cpu"} if "device" in kwargs else {}))
        return pytree.tree_map_only(Tensor, partial(_moved, device="meta"), found)


def _moved(value: Tensor, device: str) -> Tensor:
    """Return a tensor of the same kind elsewhere; there are no values to copy."""
    if value.layout != torch.strided:
        return _sparse(tuple(value.shape), value.dtype, device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _sparse(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, layout=torch.sparse_coo, device=device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _like(info: Info) -> object:
    if isinstance(info, TensorInfo):
        if -1 in info.shape:
            raise LookupError("a size that only the data decides")
        return _empty(info.shape, info.dtype)
    return tuple(map(_like, info)) if isinstance(info, tuple) else info


def _sizes(shape: tuple[Dim, ...], widths: Widths) -> tuple[int, ...]:
    return tuple(dims.size_at(dim, widths) for dim in shape)


def _whole(node: fx.Node, index: int) -> tuple[int, ...]:
    """The sizes that the trace gave one output; -1 where only the data decides."""
    info = info_of(node)
    found = info[index] if isinstance(info, tuple) and index < len(info) else info
    return found.shape if isinstance(found, TensorInfo) else ()


def _agree(found: tuple[int, ...], expected: tuple[int, ...], traced: tuple[int, ...]) -> bool:
    if len(found) != len(expected):
        return not expected and len(traced) != len(found)
    free = traced if len(traced) == len(found) else (0,) * len(found)
    return all(n < 0 or a == b for a, b, n in zip(found, expected, free, strict=True))
