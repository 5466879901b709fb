"""Graph + plan -> the graphs of a doll and of its sub-models.

One `Rewriter` writes nodes at a level. At the last level of a masked plan this is the masked model;
at a lower level it is a sub-model; the tail is written once per level over prefixes of the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen

from matryoshkafy import dims
from matryoshkafy.cleaning import bound_args, op_name
from matryoshkafy.dims import Dim, Widths
from matryoshkafy.kernels import ops as _ops
from matryoshkafy.plan import Action, Many, Plan, Scalar
from matryoshkafy.resizing import resize
from matryoshkafy.tracing import Signature, Trace
from matryoshkafy.weights import weight_places

aten = torch.ops.aten
nested = torch.ops.matryoshkafy
assert _ops

Key = tuple[fx.Node, int]
# Where a parameter-only statistic, or a parameter of a live graph, stands: before any cut.
FULL_LEVEL = 10**6


@dataclass(frozen=True)
class Mask:
    """A weight is zero where the level of its output dim is below that of its input dim."""

    out: int
    into: int


def sub_graph(trace: Trace, plan: Plan, level: int) -> fx.Graph:
    """Return the standalone graph of a level: parameters are already cut (and masked)."""
    writer = Rewriter(trace, plan, Standalone())
    return writer.finish([level])


def full_graph(trace: Trace, plan: Plan) -> fx.Graph:
    """Return the graph of the doll's own call, at full size."""
    return Rewriter(trace, plan, Live()).finish([plan.levels - 1])


def outputs_graph(trace: Trace, plan: Plan, levels: list[int]) -> fx.Graph:
    """Return the graph of the outputs of several levels, one flat list after the other."""
    graph = Rewriter(trace, plan, Live()).finish(levels)
    graph.set_codegen(CallCodeGen(trace.signature, flat=True))
    return graph


def readout_graph(trace: Trace, plan: Plan) -> fx.Graph | None:
    """Return the graph of (hidden, table, bias) where the whole tail is one linear, else None."""
    node = readout_node(trace, plan)
    if node is None:
        return None
    writer = Rewriter(trace, plan, Live())
    graph = writer.finish_values([v for v in _readout_operands(node)])
    graph.set_codegen(CallCodeGen(trace.signature, flat=True))
    return graph


def readout_node(trace: Trace, plan: Plan) -> fx.Node | None:
    """Return the one node of the tail: hidden @ table', the model's only tensor output."""
    output = next(iter(reversed(trace.graph.nodes)))
    outputs = [v for v in output.args[0] if isinstance(v, fx.Node)]  # type: ignore[union-attr]
    if len(outputs) != 1 or plan.tail != {outputs[0].name}:
        return None
    node = outputs[0]
    if op_name(node) not in ("linear", "matmul", "mm"):
        return None
    hidden, table, bias = _readout_operands(node)
    shapes = plan.nodes[hidden.name], plan.nodes[table.name]
    inner = shapes[0][-1]
    plain = len(shapes[1]) == 2 and isinstance(inner[0], dims.Nested)
    leading = not any(map(dims.is_nested, (*shapes[0][:-1],)))
    return node if plain and leading and bias is not node else None


def _readout_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    bias = bound_args(node).get("bias")
    return node.args[0], node.args[1], bias  # type: ignore[return-value]


class CallCodeGen(CodeGen):
    """Writes a forward that takes the user's arguments and returns the user's output structure.

    With `flat` the outputs are returned as the list they are in the graph.
    """

    def __init__(self, signature: Signature, *, flat: bool = False) -> None:
        super().__init__()
        self.signature, self.flat = signature, flat

    def additional_globals(self) -> list[tuple[str, Any]]:
        """The signature, under a name that no node can have."""
        return [("_call_signature", self.signature)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **kwargs: Any) -> str:
        """def forward(self, *args, **kwargs), then the flat inputs under their names."""
        del maybe_return_annotation, kwargs
        names = [v.partition(":")[0].partition("=")[0].strip() for v in free_vars if v != "self"]
        flat = f"[{', '.join(names)}]" if names else "_"
        return (
            "def forward(self, *args, **kwargs):\n"
            f"    {flat} = _call_signature.flatten(args, kwargs)"
        )

    def generate_output(self, output_args: Any, *args: Any, **kwargs: Any) -> str:
        """return the outputs in the user's structure"""
        del args, kwargs
        values = f"{output_args!r}"
        return f"return {values}" if self.flat else f"return _call_signature.unflatten({values})"


class Live:
    """Parameters at full width: a lower level reads a slice of them."""

    standalone = False


class Standalone:
    """Parameters cut beforehand: the graph reads them as they are."""

    standalone = True


class Rewriter:
    """Writes nodes of the user's graph at levels into a new graph; each (node, level) once."""

    def __init__(self, trace: Trace, plan: Plan, source: Live | Standalone) -> None:
        self.trace, self.plan, self.source = trace, plan, source
        self.graph = fx.Graph()
        self.graph.set_codegen(CallCodeGen(trace.signature))
        self.written: dict[Key, Any] = {}
        self.masks = weight_masks(trace, plan)
        self.top = plan.levels - 1

    def finish(self, levels: list[int]) -> fx.Graph:
        """Write the outputs of the levels and return the graph."""
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self._put(node, -1, self.graph.placeholder(str(node.target)))
        output = next(iter(reversed(self.trace.graph.nodes)))
        flat: list[Any] = []
        for level in levels:
            for position, value in enumerate(output.args[0]):  # type: ignore[arg-type]
                flat.append(self._output(position, value, level))
        self.graph.output(flat)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def finish_values(self, values: list[fx.Node | None]) -> fx.Graph:
        """Write values of the trunk at full width and return the graph of them."""
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self._put(node, -1, self.graph.placeholder(str(node.target)))
        self.graph.output([self.at(v, self.top) for v in values])
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def _output(self, position: int, value: Any, level: int) -> Any:
        if not isinstance(value, fx.Node):
            return value
        written = self.at(value, level)
        extra = self.plan.notes.get("output", {}).get(str(position))
        if extra is None:
            return written
        shape = (*[(n,) for n in value.meta["shape"].shape[:-1]], extra)
        return self.cut(written, shape, self.plan.ladder[level])

    # Values.

    def at(self, node: Any, level: int) -> Any:
        """Return the value of an old node at a level, writing whatever it needs."""
        if not isinstance(node, fx.Node):
            return node
        for needed in _needed(node, level, self):
            if needed not in self.written:
                self.written[needed] = self._write(*needed)
        return self.written[self.key(node, level)]

    def key(self, node: fx.Node, level: int) -> Key:
        """Return at which level a node is written where `level` is asked for."""
        if node.op != "placeholder":
            return node, level
        freed = any(map(dims.is_nested, self.plan.nodes.get(node.name, ())))
        return node, (level if freed and level != FULL_LEVEL else -1)

    def _trunk(self, node: fx.Node) -> bool:
        """A trunk value of a masked doll is computed once, at full width, and read by prefix."""
        return (
            self.plan.masked
            and not self.source.standalone
            and node.op == "call_function"
            and node.name not in self.plan.tail
        )

    def sources(self, node: fx.Node, level: int) -> list[Key]:
        """Return what must be written before (node, level)."""
        if level == FULL_LEVEL:
            pass
        elif self._cut_from_full(node, level):
            return [] if self.source.standalone else [(node, FULL_LEVEL)]
        elif self._trunk(node) and level != self.top:
            return [(node, self.top)]
        return [self.key(n, level) for n in node.all_input_nodes]

    def _cut_from_full(self, node: fx.Node, level: int) -> bool:
        if self.source.standalone and is_reparametrised(node):
            return False
        return node.name in self.plan.full and level != FULL_LEVEL

    def _write(self, node: fx.Node, level: int) -> Any:
        if node.op == "get_attr":
            return self._state(node, level)
        if node.op == "placeholder":
            return self._input(node, level)
        if self._cut_from_full(node, level):
            if self.source.standalone:
                return self._put(node, level, self.graph.get_attr(baked_name(node)))
            return self._cut_value(node, FULL_LEVEL, level)
        if self._trunk(node) and level not in (self.top, FULL_LEVEL):
            return self._cut_value(node, self.top, level)
        return self._put(node, level, self._apply(node, level))

    def _input(self, node: fx.Node, level: int) -> Any:
        """An input whose axis the user freed: a sub-model takes its prefix, a doll cuts it."""
        if self.source.standalone or level == self.top:
            return self.written[node, -1]
        return self._cut_value(node, -1, level)

    def _put(self, node: fx.Node, level: int, new: Any) -> Any:
        new.meta = {k: node.meta[k] for k in ("source",) if k in node.meta}
        new.meta["origin"] = (node.name, level)
        self.written[node, level] = new
        return new

    def _cut_value(self, node: fx.Node, have: int, want: int) -> Any:
        value = self.written[node, have]
        widths = self.plan.ladder[want]
        shape = self.plan.nodes.get(node.name, ())
        if isinstance(shape, Many):
            return value
        return self.cut(value, shape, widths)

    def cut(self, value: fx.Node, shape: tuple[Dim, ...], widths: Widths) -> fx.Node:
        """Return the part of a value that is kept at the given widths."""
        for i, dim in enumerate(shape):
            segments = dims.relative(dim, self.plan.ladder[-1], widths)
            if segments is not None:
                value = self._cut_dim(value, i, segments)
        return value

    def _cut_dim(self, value: fx.Node, dim: int, segments: dims.Segments) -> fx.Node:
        call = self.graph.call_function
        parts = [call(aten.slice.Tensor, (value, dim, a, b)) for a, b in segments]
        return parts[0] if len(parts) == 1 else call(aten.cat.default, (parts, dim))

    def _state(self, node: fx.Node, level: int) -> Any:
        known = self.written.get((node, FULL_LEVEL))
        if known is None:
            known = self._attribute(node)
        if self.source.standalone or level == FULL_LEVEL:
            return known
        widths = self.plan.ladder[level]
        return self.cut(known, self.plan.parameters.get(str(node.target), ()), widths)

    def _attribute(self, node: fx.Node) -> fx.Node:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new = self.graph.get_attr(str(node.target))
        return self._put(node, FULL_LEVEL, new)

    # Nodes.

    def _apply(self, node: fx.Node, level: int) -> fx.Node:
        picked = getattr(node.target, "__name__", "") == "getitem"
        if picked and isinstance(node.args[0], fx.Node):
            return self._copy(node, level, resized=False)
        action = self.plan.actions.get(node.name)
        if action is None or level == FULL_LEVEL or not self.plan.masked:
            return self._copy(node, level)
        return ACTIONS[action.kind](self, node, level, action)

    def copy_args(self, node: fx.Node, level: int) -> tuple[Any, Any]:
        """Return the node's arguments at a level."""
        return fx.map_arg((node.args, node.kwargs), lambda n: self.written[self.key(n, level)])

    def _copy(self, node: fx.Node, level: int, *, resized: bool = True) -> fx.Node:
        args, kwargs = self.copy_args(node, level)
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        if resized and level != FULL_LEVEL and hasattr(node.target, "_schema"):
            resize(self.plan, self.plan.ladder[level], node, new)
            self._rescale(node, level, new)
        return new

    def _rescale(self, node: fx.Node, level: int, new: fx.Node) -> None:
        for scalar in self.plan.scalars:
            if scalar.node == node.name:
                width = self.plan.ladder[level][scalar.group]
                new.update_arg(int(scalar.argument), self._constant(node, new, scalar, width))

    def _constant(self, node: fx.Node, new: fx.Node, scalar: Scalar, width: int) -> Any:
        """A tensor of one element stays a tensor: pow of two tensors takes no number."""
        value = scalar.at(width)
        if scalar.form == "power":
            return value
        with self.graph.inserting_before(new):
            old = new.args[int(scalar.argument)]
            return self.graph.call_function(aten.full_like.default, (old, value))

    def runs(self, dim: Dim, level: int) -> list[int]:
        """Return the level of each index of a dim, run-length coded."""
        return list(dims.runs(dim, self.plan.ladder[: level + 1]))


def _needed(node: fx.Node, level: int, writer: Rewriter) -> list[Key]:
    """Return (node, level) and what it needs, inputs first, without recursion."""
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


def is_reparametrised(node: fx.Node) -> bool:
    """Tell whether a sub-model keeps g v / |v| as it is: v becomes the cut weight and g its norm.

    Then the small model computes its weight as the user's class does, from the user's two names.
    """
    plain = op_name(node) == "_weight_norm"
    return plain and all(n.op == "get_attr" and len(n.users) == 1 for n in node.all_input_nodes)


def baked_name(node: fx.Node) -> str:
    """Return the name under which a sub-model keeps a full-width statistic of its parameters."""
    return f"baked_{node.name}"


# --- masked actions ---------------------------------------------------------------------------


def _plain(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    del action
    return writer._copy(node, level)


def _clamp(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """Every operand keeps the smallest size of the axes that are summed here."""
    groups = set(action.groups)
    ladder = list(writer.plan.ladder[level])
    smallest = [w if i in groups else ladder[i] for i, w in enumerate(writer.plan.ladder[0])]

    def narrowed(value: fx.Node) -> Any:
        new = writer.written[writer.key(value, level)]
        shape = writer.plan.nodes.get(value.name, ())
        if isinstance(shape, Many) or not isinstance(new, fx.Node):
            return new
        for i, dim in enumerate(shape):
            if groups & set(dims.groups_of(dim)):
                segments = dims.relative(dim, tuple(ladder), tuple(smallest))
                new = new if segments is None else writer._cut_dim(new, i, segments)
        return new

    args, kwargs = fx.map_arg((node.args, node.kwargs), narrowed)
    new = writer.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    resize(writer.plan, tuple(smallest), node, new)
    return new


def _mask(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """A contraction with a parameter: fast nested operators where they exist, masked weights
    else.
    """
    if writer.source.standalone and all(
        m in writer.masks for m in _masked_weights(node, writer.plan)
    ):
        return writer._copy(node, level)
    fast = FAST.get(op_name(node))
    new = fast(writer, node, level) if fast else None
    return new if new is not None else _mask_weights(writer, node, level, action)


def _mask_weights(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    masks = node_masks(node, writer.plan)

    def masked(value: fx.Node) -> Any:
        new = writer.written[writer.key(value, level)]
        shape = writer.plan.nodes.get(value.name, ())
        for mask in masks.get(value, ()):
            runs = [writer.runs(shape[d], level) for d in (mask.out, mask.into)]
            new = writer.graph.call_function(nested.mask.default, (new, mask.out, mask.into, *runs))
        return new

    del action
    args, kwargs = fx.map_arg((node.args, node.kwargs), masked)
    new = writer.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    resize(writer.plan, writer.plan.ladder[level], node, new)
    return new


def node_masks(node: fx.Node, plan: Plan) -> dict[fx.Node, tuple[Mask, ...]]:
    """Return which weights of a masked contraction are masked, over which of their dims."""
    found = {}
    for weight, place in weight_places(node).items():
        shape = plan.nodes[weight.name]
        into = [i for i in place.into if dims.is_nested(shape[i])]
        masks = tuple(Mask(o, i) for i in into for o in place.outs)
        if masks:
            found[weight] = masks
    return found


def _masked_weights(node: fx.Node, plan: Plan) -> list[fx.Node]:
    return list(node_masks(node, plan))


def weight_masks(trace: Trace, plan: Plan) -> dict[fx.Node, Mask]:
    """Return the parameters that a sub-model can store with their zeros written out.

    Only where every reader of the parameter masks it in the same way.
    """
    wanted: dict[fx.Node, set[Any]] = {}
    for node in trace.graph.nodes:
        if plan.masked and plan.actions.get(node.name, Action("")).kind == "mask":
            for weight, masks in node_masks(node, plan).items():
                wanted.setdefault(weight, set()).add(masks if len(masks) == 1 else None)
    by_target: dict[str, set[Any]] = {}
    for weight, masks in wanted.items():
        readers = {n for n in weight.users if plan.actions.get(n.name, Action("")).kind == "mask"}
        whole = weight.op == "get_attr" and readers == set(weight.users)
        by_target.setdefault(str(weight.target), set()).update(masks if whole else {None})
    out = {}
    for weight in wanted:
        masks = by_target[str(weight.target)]
        if len(masks) == 1 and None not in masks:
            out[weight] = next(iter(masks))[0]
    return _without_aliased(trace, out)


def _without_aliased(trace: Trace, masks: dict[fx.Node, Mask]) -> dict[fx.Node, Mask]:
    """A tied tensor under a second name may be read without a mask."""
    state = trace.state()
    owners: dict[int, set[str]] = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr" and str(node.target) in state:
            owners.setdefault(id(state[str(node.target)]), set()).add(str(node.target))
    return {
        n: m for n, m in masks.items() if len(owners.get(id(state.get(str(n.target))), ())) <= 1
    }


def _fast_linear(writer: Rewriter, node: fx.Node, level: int) -> fx.Node | None:
    a = bound_args(node)
    if len(writer.plan.nodes[a["weight"].name]) != 2:
        return None
    new = {
        k: writer.written[writer.key(v, level)] if isinstance(v, fx.Node) else v
        for k, v in a.items()
    }
    return _linear(
        writer,
        node,
        (new["input"], new["weight"], new["bias"]),
        (writer.plan.nodes[a["weight"].name], level),
    )


def _linear(writer: Rewriter, node: fx.Node, operands: Any, place: Any) -> fx.Node:
    shape, level = place
    runs = [writer.runs(d, level) for d in shape]
    return writer.graph.create_node(
        "call_function", nested.linear.default, (*operands, *runs), {}, name=node.name
    )


def _fast_product(writer: Rewriter, node: fx.Node, level: int) -> fx.Node | None:
    """x @ W (and bias + x @ W): the weight turned is the weight of a linear."""
    names = list(bound_args(node))
    a = bound_args(node)
    biased = op_name(node) == "addmm"
    x, weight = (a[n] for n in (names[1:3] if biased else names[:2]))
    shape = writer.plan.nodes[weight.name]
    masks = node_masks(node, writer.plan)
    if len(shape) != 2 or weight not in masks or (biased and (a["beta"], a["alpha"]) != (1, 1)):
        return None
    bias = a["self"] if biased else None
    if bias is not None and len(writer.plan.nodes[bias.name]) != 1:
        return None
    new = [
        writer.written[writer.key(v, level)] if v is not None else None for v in (x, weight, bias)
    ]
    turned = writer.graph.call_function(aten.t.default, (new[1],))
    return _linear(writer, node, (new[0], turned, new[2]), (shape[::-1], level))


def _fast_conv(writer: Rewriter, node: fx.Node, level: int) -> fx.Node | None:
    a = bound_args(node)
    shape = writer.plan.nodes[a["weight"].name]
    if isinstance(a["padding"], str) or a["groups"] != 1:
        return None
    transposed = "transpose" in op_name(node)
    rank = len(shape) - 2
    out, into = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    new = {
        k: writer.written[writer.key(v, level)] if isinstance(v, fx.Node) else v
        for k, v in a.items()
    }
    geometry = (
        _spread(a["stride"], rank),
        _spread(a["padding"], rank),
        _spread(a["dilation"], rank),
        transposed,
        _spread(a.get("output_padding", 0), rank),
        1,
    )
    runs = [writer.runs(d, level) for d in (out, into)]
    args = (new["input"], new["weight"], new["bias"], *geometry, *runs)
    return writer.graph.create_node("call_function", nested.conv.default, args, {}, name=node.name)


def _spread(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


FAST: Mapping[str, Callable[[Rewriter, fx.Node, int], fx.Node | None]] = {
    "linear": _fast_linear,
    "addmm": _fast_product,
    "mm": _fast_product,
    "matmul": _fast_product,
    "conv1d": _fast_conv,
    "conv2d": _fast_conv,
    "conv3d": _fast_conv,
    "conv_transpose1d": _fast_conv,
    "conv_transpose2d": _fast_conv,
    "conv_transpose3d": _fast_conv,
}


def _norm(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """Statistics of each unit's own level, or of its prefix."""
    del action
    a = bound_args(node)
    new = {
        k: writer.written[writer.key(v, level)] if isinstance(v, fx.Node) else v
        for k, v in a.items()
    }
    prefix = writer.plan.options.norm == "prefix"
    shape = writer.plan.nodes[a["input"].name]
    name = op_name(node)
    if name == "group_norm":
        return _group_norm(writer, node, level, (new, shape, prefix))
    runs = writer.runs(shape[-1], level)
    eps = a["eps"] if a["eps"] is not None else torch.finfo(node.meta["shape"].dtype).eps
    affine = (new["weight"], new["bias"]) if name == "layer_norm" else (new["weight"],)
    target = nested.layer_norm.default if name == "layer_norm" else nested.rms_norm.default
    return writer.graph.create_node(
        "call_function", target, (new["input"], *affine, eps, runs, prefix), {}, name=node.name
    )


def _group_norm(writer: Rewriter, node: fx.Node, level: int, given: Any) -> fx.Node:
    new, shape, prefix = given
    args = (
        new["input"],
        new["weight"],
        new["bias"],
        new["eps"],
        writer.runs(shape[1], level),
        prefix,
    )
    return writer.graph.create_node(
        "call_function", nested.group_norm.default, args, {}, name=node.name
    )


KINDS = {"linalg_vector_norm": "norm"}


def _level(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """A statistic over a nested axis, kept at full length: each unit has its own level's."""
    del action
    a = bound_args(node)
    source: Any = node.args[0]
    shape = writer.plan.nodes[source.name]
    over = [d % len(shape) for d in ([a["dim"]] if isinstance(a["dim"], int) else a["dim"])]
    dim = next(d for d in over if dims.is_nested(shape[d]))
    kind = KINDS.get(op_name(node), op_name(node))
    kind += "0" if a.get("correction") == 0 else ""
    args = (
        writer.written[writer.key(source, level)],
        over,
        dim,
        writer.runs(shape[dim], level),
        kind,
        writer.plan.options.norm == "prefix",
    )
    return writer.graph.create_node(
        "call_function", nested.level_reduce.default, args, {}, name=node.name
    )


ACTIONS: Mapping[str, Callable[[Rewriter, fx.Node, int, Action], fx.Node]] = {
    "mask": _mask,
    "norm": _norm,
    "level": _level,
    "clamp": _clamp,
    "readout": _plain,
}
