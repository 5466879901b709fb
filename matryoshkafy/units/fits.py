"""Fits: which parameters of a graph least squares may set, from what, and to reach which value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from matryoshkafy.graph.nodes import (
    bound_args,
    gives_several,
    is_op,
    is_tensor,
    op_key,
    reached,
    readers_of,
    tensor_info,
)
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import weight_places
from matryoshkafy.units.normed import NORMS


@dataclass(frozen=True)
class Fit:
    """A product with a weight, or a norm with a gain, at `node`.

    `value` is the node that it reads; `weight` and `bias` name the parameters; `norm` the word of
    the norm ("" for a product); `eps` that of the norm; `turned`: the weight is [in, out].
    `reached` is the node that should be right: the sum of a product and `other`, where nothing
    stands between; so the product makes up for what is missing on the stream.
    """

    node: fx.Node
    value: fx.Node
    weight: str
    bias: str | None
    reached: fx.Node
    other: fx.Node | None = None
    norm: str = ""
    eps: float = 0.0
    turned: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that it sets."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def fits_of(
    graph: fx.Graph, full: fx.Graph, state: Mapping[str, Tensor]
) -> tuple[dict[fx.Node, Fit], dict[str, str]]:
    """Return what may be fitted by node, and {weight: why} of what stays as it was.

    Args:
        graph: the standalone graph of a size.
        full: the graph of the full model, where its nodes come from.
        state: the tensors of the size, ties under each of their names.
    """
    found: dict[fx.Node, Fit] = {}
    left: dict[str, str] = {}
    known = {n.name: n for n in full.nodes}
    places = {n: i for i, n in enumerate(graph.nodes)}
    reads = Counter(
        id(state.get(str(n.target)))
        for n in graph.find_nodes(op="get_attr")
        for user in n.users
        if user.target is not getattr  # which asks for its dtype or device alone
    )
    loose = _picked_by_value(full)
    for node in graph.nodes:
        origin = known.get(origin_of(node))
        weight = _weight_of(origin) if origin is not None else None
        if origin is None or weight is None:
            continue
        fit, why = _fit(node, origin, weight)
        if origin in loose:
            fit, why = None, "which rows it reads depends on values (a router, a top k)"
        elif fit is not None and any(reads[id(state[n])] > 1 for n in fit.parameters):
            fit, why = None, "it is read in several places"
        if fit is None:
            left[weight] = why
        else:
            found[node] = _corrected(fit, known, places)
    return found, left


def origin_of(node: fx.Node) -> str:
    """Return the name that a node has in the full model's graph."""
    return str(node.meta.get("origin", ("", 0))[0])


def _picked_by_value(graph: fx.Graph) -> set[fx.Node]:
    """Return what is made of rows that were picked by computed values: those of a slice may be
    others than the full model's.
    """
    computed: set[fx.Node] = set()
    picks: list[fx.Node] = []
    for node in graph.nodes:
        own = (
            node.op == "get_attr" and is_tensor(node) and tensor_info(node).dtype.is_floating_point
        )
        if own or (_holds(node) and any(n in computed for n in node.all_input_nodes)):
            computed.add(node)
            if is_tensor(node) and _chooses(node, computed):
                picks.append(node)
    return reached(picks, readers_of)


def _holds(node: fx.Node) -> bool:
    return is_tensor(node) or gives_several(node)


def _chooses(node: fx.Node, computed: set[fx.Node]) -> bool:
    """Tell whether a computed value is an index, or picks by computed booleans."""
    kinds = (n for n in node.all_input_nodes[1:] if n in computed and is_tensor(n))
    masked = op_of(node).picks and any(tensor_info(n).dtype == torch.bool for n in kinds)
    dtype = tensor_info(node).dtype
    whole = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
    return whole or masked


def _weight_of(node: fx.Node) -> str | None:
    """Return the parameter that a product or a norm reads, None where it reads none itself."""
    return next((str(n.target) for n in _weights(node) if n.op == "get_attr"), None)


def _weights(node: fx.Node) -> Iterator[fx.Node]:
    if op_of(node).nested in NORMS:
        gain = bound_args(node).get("weight")
        yield from [gain] if isinstance(gain, fx.Node) else []
    elif op_of(node).reads is not None:
        yield from weight_places(node)


def _fit(node: fx.Node, origin: fx.Node, weight: str) -> tuple[Fit | None, str]:
    """Return the fit of a node, or why there is none."""
    args, row = bound_args(node), op_of(node)
    norm = row.nested if row.nested in NORMS else ""
    reads = None if norm else row.reads
    value = args.get(reads[0] if reads else "input")
    bias = args.get("bias", args.get("self") if reads and reads[0] != "self" else None)
    gain = next((n for n in node.all_input_nodes if str(n.target) == weight), None)
    held = [n for n in (gain, bias) if n is not None]
    read = all(getattr(n, "op", "") == "get_attr" for n in held)
    if not isinstance(value, fx.Node) or gain in (None, value) or not read:
        return None, "it is computed, or what is added to it is"
    named = None if bias is None else str(bias.target)
    if norm:
        fit = Fit(node, value, weight, named, node, norm=norm, eps=args.get("eps") or 1e-6)
        return (fit, "") if len(args["normalized_shape"]) == 1 else (None, "it is of several dims")
    place = next(p for w, p in weight_places(origin).items() if str(w.target) == weight)
    matrix = {(*place.outs, *place.into)} <= {(0, 1), (1, 0)} and reads and reads[1] == -1
    if not matrix or any(args.get(n, 1) != 1 for n in ("alpha", "beta")):
        return None, f"{op_key(node)} is no plain product with a matrix"
    return Fit(node, value, weight, named, node, turned=place.into == (0,)), ""


def _corrected(fit: Fit, known: Mapping[str, fx.Node], places: Mapping[fx.Node, int]) -> Fit:
    """Return the fit that reaches the sum in which its product stands, where it stands alone."""
    at = fit.node
    users = list(at.users)
    while len(users) == 1 and _passes(users[0]):
        at, users = users[0], list(users[0].users)
    if fit.norm or len(users) != 1 or op_of(users[0]).algebra != "add":
        return fit
    total = users[0]
    if origin_of(total) not in known:
        return fit
    others = [a for a in total.all_input_nodes if a is not at and places[a] < places[fit.node]]
    scaled = len(total.args) != 2 or total.kwargs
    shapes = {_shape(known[origin_of(n)]) for n in (fit.node, total)}
    if scaled or len(others) != 1 or len(shapes) != 1:
        return fit
    return replace(fit, reached=total, other=others[0])


def _passes(node: fx.Node) -> bool:
    """Tell whether a value comes out as it went in, in evaluation mode (dropout has `train`)."""
    word = op_of(node).algebra
    return word == "same" or (word == "carry" and is_op(node) and "train" in bound_args(node))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tensor_info(node).shape
