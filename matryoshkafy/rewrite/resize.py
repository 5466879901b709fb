"""The constants of each op that are sizes, and how they follow a level. A row is an op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Widths
from matryoshkafy.graph.nodes import bound_args, op_key, set_arg
from matryoshkafy.plan.plan import Many, Plan
from matryoshkafy.rules.contraction import CONVOLUTIONS, TRANSPOSED
from matryoshkafy.rules.creation import FILLED
from matryoshkafy.rules.view import SPLITS

aten = torch.ops.aten
END = 2**63 - 1


class Resize:
    """One node being written at one level: the plan's dims of the old node and its inputs."""

    def __init__(self, plan: Plan, widths: Widths, old: fx.Node, new: fx.Node) -> None:
        self.plan, self.widths, self.old, self.new = plan, widths, old, new

    def dims_of(self, node: Any) -> tuple[Dim, ...]:
        """Return the dims of an old node (of its first output where it has several)."""
        value = self.plan.nodes.get(node.name, ()) if isinstance(node, fx.Node) else ()
        return value[0] if isinstance(value, Many) else value

    def at(self, dim: Dim) -> int:
        """Return the size of a dim at this level."""
        return dims.size_at(dim, self.widths)

    def kept_before(self, dim: Dim, index: int) -> int:
        """Return how many of the first `index` units are kept at this level."""
        return sum(min(b, index) - a for a, b in dims.kept(dim, self.widths) if a < index)

    def scaled(self, value: Any, dim: Dim) -> Any:
        """Return a size constant at this level; a symbolic one keeps its ratio."""
        if not dims.is_nested(dim) or (isinstance(value, int) and value < 0):
            return value
        if isinstance(value, int):
            return self.at(dim)
        graph = self.new.graph
        with graph.inserting_before(self.new):
            product = graph.call_function(operator.mul, (value, self.at(dim)))
            return graph.call_function(operator.floordiv, (product, dims.size(dim)))


def _sizes(r: Resize) -> None:
    """One constant for each dim of the output."""
    a = bound_args(r.new)
    name = "size" if "size" in a else "shape"
    out = r.dims_of(r.old)
    set_arg(r.new, name, [r.scaled(v, d) for v, d in zip(a[name], out, strict=True)])


def _unflatten(r: Resize) -> None:
    a = bound_args(r.new)
    rank = len(r.dims_of(r.old.args[0]))
    out = r.dims_of(r.old)[a["dim"] % rank :]
    set_arg(r.new, "sizes", [r.scaled(v, d) for v, d in zip(a["sizes"], out, strict=False)])


def _repeat(r: Resize) -> None:
    name = "repeats" if "repeats" in bound_args(r.new) else "dims"
    value = list(bound_args(r.new)[name])
    source, out = r.dims_of(r.old.args[0]), r.dims_of(r.old)
    for i, dim in enumerate(out):
        at = i - (len(out) - len(source))
        if dims.is_nested(dim) and (at < 0 or dims.size(source[at]) == 1):
            value[i] = r.scaled(value[i], dim)
    set_arg(r.new, name, value)


def _repeat_interleave(r: Resize) -> None:
    a = bound_args(r.new)
    source, out = r.dims_of(r.old.args[0]), r.dims_of(r.old)
    dim = a["dim"] % len(out)
    if dims.is_nested(out[dim]) and dims.size(source[dim]) == 1:
        set_arg(r.new, "repeats", r.scaled(a["repeats"], out[dim]))
    if a.get("output_size") is not None:
        set_arg(r.new, "output_size", r.scaled(a["output_size"], out[dim]))


def _arange(r: Resize) -> None:
    (out,) = r.dims_of(r.old)
    if dims.is_nested(out):
        set_arg(r.new, "end", bound_args(r.new).get("start", 0) + r.at(out))


def _split(r: Resize) -> None:
    """A split by count or by size becomes a split into the pieces of this level."""
    a = bound_args(r.new)
    source = r.dims_of(r.old.args[0])
    dim = a.get("dim", 0) % len(source)
    if not dims.is_nested(source[dim]):
        return
    pieces = [d[dim] for d in r.plan.nodes[r.old.name]]
    r.new.target = aten.split_with_sizes.default
    r.new.args, r.new.kwargs = (r.new.args[0], [r.at(p) for p in pieces], dim), {}


def _slice(r: Resize) -> None:
    a = bound_args(r.new)
    source = r.dims_of(r.old.args[0])
    dim = a["dim"] % len(source)
    if not dims.is_nested(source[dim]):
        return
    size = dims.size(source[dim])
    start, end = _bounds(a, size)
    if a.get("step", 1) != 1:
        return
    new_start, new_end = (r.kept_before(source[dim], i) for i in (start, end))
    set_arg(r.new, "start", new_start)
    set_arg(
        r.new,
        "length" if "length" in a else "end",
        new_end - new_start if "length" in a else new_end,
    )


def _bounds(a: dict[str, Any], size: int) -> tuple[int, int]:
    start = a.get("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if "length" in a:
        return start, start + a["length"]
    end = END if a.get("end") is None else a["end"]
    return start, min(max(end + size if end < 0 else end, 0), size)


def _normalized(r: Resize) -> None:
    source = r.dims_of(r.old.args[0])
    count = len(bound_args(r.new)["normalized_shape"])
    set_arg(r.new, "normalized_shape", [r.at(d) for d in source[-count:]])


def _groups(name: str) -> Callable[[Resize], None]:
    def resize(r: Resize) -> None:
        groups = r.plan.notes.get(r.old.name, {}).get("groups")
        if groups is not None and dims.is_nested(groups):
            set_arg(r.new, name, r.at(groups))

    return resize


RESIZERS: dict[str, Callable[[Resize], None]] = {
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "_unsafe_view",
            "expand",
            "view_copy",
            "broadcast_to",
            *FILLED,
        ),
        _sizes,
    ),
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "unflatten": _unflatten,
    "arange": _arange,
    **dict.fromkeys(SPLITS, _split),
    "slice": _slice,
    "narrow": _slice,
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "_fused_rms_norm": _normalized,
    "native_layer_norm": _normalized,
    "group_norm": _groups("num_groups"),
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), _groups("groups")),
}


def resize(plan: Plan, widths: Widths, old: fx.Node, new: fx.Node) -> None:
    """Write the size constants of `new`, a copy of `old`, for a level."""
    row = RESIZERS.get(op_key(old))
    if row is not None and old.name in plan.nodes:
        row(Resize(plan, widths, old, new))
