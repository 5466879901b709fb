"""Ops that rearrange all of a tensor: reshapes group runs of equal product, dims change places."""

from __future__ import annotations

import math

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import is_tensor, op_key, tensor_info
from matryoshkafy.rules.table import (
    Args,
    Argument,
    Result,
    Sizes,
    Terms,
    Walk,
    dims_of,
    hold,
    rule,
)


def _unflattened(sizes: Sizes) -> None:
    a = sizes.args
    out = sizes.outputs[0][a["dim"] % len(sizes.source) :]
    sizes.set("sizes", [sizes.scaled(v, d) for v, d in zip(a["sizes"], out, strict=False)])


@rule("view", "_unsafe_view", "view_copy", sizes="size", picks=True)
@rule("reshape", sizes="shape", picks=True)
@rule("unflatten", sizes=_unflattened, picks=True)
@rule("flatten", "ravel", "squeeze", "unsqueeze", picks=True)
@rule("atleast_1d", "atleast_2d", "atleast_3d", picks=True)
def reshape(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Minimal runs of dims with equal product become one another."""
    del args
    source = node.args[0]
    if op_key(node) == "view" and _item_size(source) != _item_size(node):
        return None
    return _regroup(walk, walk.of(source), walk.shape(source), walk.shape(node))


def _item_size(value: object) -> int:
    assert isinstance(value, fx.Node)
    return tensor_info(value).dtype.itemsize


@rule("reshape_as", "view_as")
def reshape_as(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A reshape to the dims of another tensor, which are the same axes."""
    source, other = args["self"], walk.of(args["other"])
    terms = _regroup(walk, walk.of(source), walk.shape(source), walk.shape(node))
    return tuple(walk.unify(a, b) for a, b in zip(terms, other, strict=True))


def _regroup(walk: Walk, terms: Terms, old: tuple[int, ...], new: tuple[int, ...]) -> Terms:
    """Return the terms of `old` dims seen as `new` ones (row-major)."""
    if not math.prod(new):  # no unit says which dim of `old` a dim of `new` is
        hold(walk, terms, "reshaped")
        return tuple(walk.fresh(n, "reshaped") for n in new)
    out: list[Term] = []
    for ins, outs in _runs(old, new):
        whole = tuple(f for i in ins for f in axes.resolve(terms[i]))
        sizes = [new[o] for o in outs]
        pieces = axes.regroup(whole, sizes)
        if pieces is None:
            walk.fix(whole, "reshaped")
            pieces = [walk.fresh(n, "reshaped") for n in sizes]
        out.extend(pieces)
    return tuple(out)


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair minimal consecutive dims of two shapes whose products agree."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ins: list[int] = []
        outs: list[int] = []
        a = b = 1
        while not ins and not outs or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
                ins.append(i - 1)
            elif j < len(new):
                b, j = b * new[j], j + 1
                outs.append(j - 1)
            else:
                break
            if a == b and a == 1 and not outs and j < len(new) and i == len(old):
                continue
        out.append((ins, outs))
    return out


@rule("transpose", "swapaxes", "swapdims", picks=True)
def transpose(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Two dims change places."""
    del args
    terms = list(walk.of(node.args[0]))
    a, b = (int(d) % len(terms) for d in node.args[1:3])  # type: ignore[arg-type]
    terms[a], terms[b] = terms[b], terms[a]
    return tuple(terms)


@rule("t", "numpy_T", "mT", "mH", "adjoint", "matrix_H", picks=True)
def transposed(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """The last two dims change places."""
    del args
    terms = walk.of(node.args[0])
    if len(terms) < 2:
        return terms
    return (*terms[:-2], terms[-1], terms[-2])


@rule("permute", picks=True)
def permuted(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Dims are reordered."""
    del node
    terms = walk.of(args["self"])
    return tuple(terms[d] for d in dims_of(args["dims"], len(terms)))


@rule("movedim", "moveaxis", picks=True)
def movedim(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Some dims move, the others keep their order."""
    del node
    terms = walk.of(args["self"])
    source = dims_of(args["source"], len(terms))
    target = dims_of(args["destination"], len(terms))
    order = [i for i in range(len(terms)) if i not in source]
    for at, dim in sorted(zip(target, source, strict=True)):
        order.insert(at, dim)
    return tuple(terms[i] for i in order)


@rule("expand", "broadcast_to", sizes="size", picks=True)
def expand(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """A dim of size 1 becomes a new axis."""
    terms, new = walk.of(args["self"]), walk.shape(node)
    old = walk.shape(args["self"])
    offset = len(new) - len(old)
    out: list[Term] = []
    for i, n in enumerate(new):
        known = i >= offset and old[i - offset] == n
        out.append(terms[i - offset] if known else walk.fresh(n, name="expanded"))
    return tuple(out)


def _repeats(sizes: Sizes) -> None:
    name = "repeats" if "repeats" in sizes.args else "dims"
    value, source, out = list(sizes.args[name]), sizes.source, sizes.outputs[0]
    for i, dim in enumerate(out):
        at = i - (len(out) - len(source))
        if dims.is_nested(dim) and (at < 0 or not dims.is_nested(source[at])):
            value[i] = _count(sizes, value[i], dim, source[at] if at >= 0 else ())
    sizes.set(name, value)


def _count(sizes: Sizes, value: Argument, out: Dim, source: Dim) -> Argument:
    """How often units that stay whole are repeated for a width."""
    return sizes.at(out) // sizes.at(source) if isinstance(value, int) else sizes.scaled(value, out)


@rule("repeat", "tile", sizes=_repeats)
def repeat(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """n repetitions of an axis: copies(n).axis; of a dim of size 1: a new axis."""
    terms, new = walk.of(args["self"]), walk.shape(node)
    old = walk.shape(args["self"])
    offset = len(new) - len(old)
    return tuple(
        _repeated(walk, terms[i - offset] if i >= offset else (), n, samples=i == 0)
        for i, n in enumerate(new)
    )


def _repeated(walk: Walk, term: Term, n: int, *, samples: bool, inner: bool = False) -> Term:
    size = axes.size(term)
    if size == 1:
        return walk.fresh(n, name="repeated")
    if not size:
        return term
    # Samples may be repeated for each head: a mask that no layer has.
    heads = samples and not walk.is_feature(term)
    times = walk.fresh(n // size, name="repeated") if heads else axes.copies(n // size)
    return (*term, *times) if inner else (*times, *term)


def _times(sizes: Sizes) -> None:
    a, source, (out, *_) = sizes.args, sizes.source, sizes.outputs
    if "self" not in a:  # the indices themselves: how often each number comes
        return
    dim: int = (a["dim"] or 0) % len(out)
    if a["dim"] is None:
        source = (tuple(factor for each in source for factor in each),)
    if dims.is_nested(out[dim]) and not dims.is_nested(source[dim]):
        sizes.set("repeats", _count(sizes, a["repeats"], out[dim], source[dim]))
    if a.get("output_size") is not None:
        sizes.set("output_size", sizes.scaled(a["output_size"], out[dim]))


@rule("repeat_interleave", sizes=_times)
def repeat_interleave(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Each unit n times in a row: axis.copies(n). As often as there are rows, one unit is rows."""
    times = args.get("repeats")
    if times is None or is_tensor(times):
        return None
    terms, new = list(walk.of(args["self"])), walk.shape(node)
    if args.get("dim") is None:
        flat = tuple(factor for term in terms for factor in term)
        return (_repeated(walk, flat, new[0], samples=False, inner=True),)
    dim: int = args["dim"] % len(terms)
    terms[dim] = _repeated(walk, terms[dim], new[dim], samples=dim == 0, inner=True)
    return tuple(terms)
