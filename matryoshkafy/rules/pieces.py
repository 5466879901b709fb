"""Ops that take tensors apart or put pieces together: cat and split are Sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import op_key
from matryoshkafy.rules.table import Args, Result, Sizes, Terms, Walk, dims_of, hold, op_of, rule


@rule("cat", "concat", "concatenate", "hstack", "vstack", joins=True)
def cat(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Segments laid one after the other: a Sum."""
    name = op_key(node)
    tensors = [t for t in args["tensors"] if walk.shape(t) != (0,)]
    rank = len(walk.shape(node))
    if any(len(walk.shape(t)) != rank for t in tensors):
        return None
    own = {"hstack": min(1, rank - 1), "vstack": 0}
    dim: int = own[name] if name in own else args.get("dim", 0) % rank
    out = list(walk.of(tensors[0]))
    for tensor in tensors[1:]:
        for i, term in enumerate(walk.of(tensor)):
            if i != dim:
                out[i] = walk.unify(out[i], term)
    if sum(walk.shape(t)[dim] for t in tensors) == walk.shape(node)[dim]:
        out[dim] = axes.concatenate(walk.of(t)[dim] for t in tensors)
    else:  # lengths that only a call knows: the rows of each expert
        for tensor in tensors:
            walk.fix(walk.of(tensor)[dim], "indexed")
        out[dim] = walk.fresh(walk.shape(node)[dim], "indexed")
    return tuple(out)


@rule("stack")
def stack(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """A new dim of interchangeable copies."""
    tensors = args["tensors"]
    out = list(walk.of(tensors[0]))
    for tensor in tensors[1:]:
        out = [walk.unify(a, b) for a, b in zip(out, walk.of(tensor), strict=True)]
    dim: int = args["dim"] % len(walk.shape(node))
    return (*out[:dim], axes.copies(len(tensors)), *out[dim:])


def _lengths(sizes: Sizes) -> None:
    """A split by count or by size becomes a split into the pieces of this level."""
    a, source = sizes.args, sizes.source
    dim: int = a.get("dim", 0) % len(source)
    if dims.is_nested(source[dim]):
        lengths = [sizes.at(piece[dim]) for piece in sizes.outputs]
        sizes.replace(torch.ops.aten.split_with_sizes.default, lengths, dim)


@rule("split", "split_with_sizes", "chunk", sizes=_lengths, picks=True)
@rule("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", sizes=_lengths, picks=True)
@rule("tensor_split", "split_copy", "split_with_sizes_copy", sizes=_lengths, picks=True)
def split(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Consecutive pieces of one dim."""
    source = args.get("self", node.args[0])
    terms, shapes = walk.of(source), walk.shapes(node)
    dim: int = args.get("dim", 0) % len(terms)
    pieces = cut(walk, terms[dim], [s[dim] for s in shapes])
    return tuple((*terms[:dim], piece, *terms[dim + 1 :]) for piece in pieces)


def cut(walk: Walk, term: Term, lengths: list[int]) -> list[Term]:
    """Return consecutive pieces of a term, or fixed ones where it does not come apart."""
    # Lengths that only a call knows (the rows of each expert) do not add up to the whole.
    known = all(lengths) and sum(lengths) == axes.size(term)
    pieces = axes.cut(term, lengths) if known else None
    if pieces is None:
        walk.fix(term, "indexed")
        pieces = [walk.fresh(n, "indexed") for n in lengths]
    return pieces


@rule("unbind", picks=True)
def unbind(walk: Walk, node: fx.Node, args: Args) -> Result:
    """One tensor per index of a dim, which stays whole."""
    terms = walk.of(args["self"])
    dim: int = args["dim"] % len(terms)
    walk.fix(terms[dim], "indexed")
    return tuple(terms[:dim] + terms[dim + 1 :] for _ in walk.shapes(node))


END = 2**63 - 1


def _bounds(sizes: Sizes) -> None:
    a, source = sizes.args, sizes.source
    dim: int = a["dim"] % len(source)
    bounds = [a.get(name) for name in ("start", "end", "length", "step")]
    plain = all(v is None or isinstance(v, int) for v in bounds)
    # A bound that only the call knows keeps all of the dim (else its rule holds it whole).
    if not dims.is_nested(source[dim]) or not plain or a.get("step", 1) != 1:
        return
    if "length" in a:
        start, end = _given_bounds(a, dims.size(source[dim]))
        first, last = (sizes.kept_before(source[dim], i) for i in (start, end))
        sizes.set("start", first)
        sizes.set("length", last - first)
        return
    sizes.set("start", _bound(sizes, source[dim], a.get("start") or 0))
    sizes.set("end", _bound(sizes, source[dim], END if a.get("end") is None else a["end"]))


def _bound(sizes: Sizes, dim: Dim, given: int) -> int:
    """Return a bound of a slice; one that is counted from the end is so at another batch, too."""
    if given >= END:
        return END
    size = dims.size(dim)
    kept = sizes.kept_before(dim, min(max(given + size if given < 0 else given, 0), size))
    return kept if given >= 0 else kept - sizes.at(dim) or END


def _given_bounds(a: Args, size: int) -> tuple[int, int]:
    start = a.get("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if "length" in a:
        return start, start + a["length"]
    end = END if a.get("end") is None else a["end"]
    return start, min(max(end + size if end < 0 else end, 0), size)


@rule("slice", "narrow", sizes=_bounds, picks=True)
def slice_(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """A piece of one dim; every second unit of an axis halves it."""
    terms, old, new = list(walk.of(args["self"])), walk.shape(args["self"]), walk.shape(node)
    dim: int = (args["dim"] or 0) % len(terms)
    step, start, end = args.get("step", 1), args.get("start") or 0, args.get("end")
    if old[dim] == new[dim]:
        return tuple(terms)
    if any(isinstance(v, fx.Node) for v in (start, step, end, args.get("length"))):
        walk.fix(terms[dim], "indexed")
        terms[dim] = walk.fresh(new[dim], "indexed")
        return tuple(terms)
    start = min(max(start + old[dim] if start < 0 else start, 0), old[dim])
    if start == 0 and new[dim] == 1:  # the first unit, which every prefix has
        return (*terms[:dim], (), *terms[dim + 1 :])
    terms[dim] = _sliced(walk, terms[dim], (start, step, new[dim]))
    return tuple(terms)


def _only_shapes_read(node: fx.Node) -> bool:
    """Tell whether tensors are made like this one (ones_like) or it is like any other of its shape
    (zeros_like(x)[..., 0]): no unit of its own is read.
    """
    alike = op_of(node.all_input_nodes[0]).uniform
    return alike or all(op_of(user).uniform for user in node.users)


def _sliced(walk: Walk, term: Term, piece: tuple[int, int, int]) -> Term:
    start, step, length = piece
    size = axes.size(term)
    if step == 1 and length:
        lengths = [n for n in (start, length, size - start - length) if n]
        return cut(walk, term, lengths)[1 if start else 0]
    pair = axes.regroup(term, [size // step, step]) if step > 1 and size % step == 0 else None
    if pair is None or length != size // step:
        walk.fix(term, "indexed")
        return walk.fresh(length, "indexed")
    walk.fix(pair[1], "indexed")
    return pair[0]


@rule("select", picks=True)
def select(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """One index of a dim, which stays whole, unless nothing but the shape is read of it."""
    terms = walk.of(args["self"])
    dim: int = args["dim"] % len(terms)
    if args["index"] != 0 or not _only_shapes_read(node):
        walk.fix(terms[dim], "indexed")
    return terms[:dim] + terms[dim + 1 :]


@rule("slice_scatter", sizes=_bounds)
def scatter_slice(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A piece of one dim is replaced: that piece is the axis of what replaces it."""
    x, src = walk.of(args["self"]), walk.of(args["src"])
    dim: int = (args.get("dim") or 0) % len(x)
    size = walk.shape(args["self"])[dim]
    bounds = [args.get(name) for name in ("start", "end")]
    plain = all(v is None or isinstance(v, int) for v in bounds) and args.get("step", 1) == 1
    if not plain or size == walk.shape(args["src"])[dim]:
        return scatter_view(walk, node, args)
    start, end = _given_bounds(args, size)
    lengths = [start, end - start, size - end]
    piece = cut(walk, x[dim], [n for n in lengths if n])[1 if start else 0]
    walk.unify(piece, src[dim])
    for i in (i for i in range(len(x)) if i != dim):
        walk.unify(x[i], src[i])
    return tuple(walk.of(args["self"]))


@rule("select_scatter")
def scatter_view(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Part of one dim is replaced; that dim stays whole, unless all of it is replaced."""
    del node
    x, src = walk.of(args["self"]), walk.of(args["src"])
    dim: int = args["dim"] % len(x)
    if walk.shape(args["self"]) == walk.shape(args["src"]):
        return tuple(walk.unify(a, b) for a, b in zip(x, src, strict=True))
    others = src[:dim] + src[dim + 1 :] if len(src) == len(x) else src
    walk.fix(x[dim], "indexed")
    if len(src) == len(x):
        walk.fix(src[dim], "indexed")
    kept = x[:dim] + x[dim + 1 :]
    for a, b in zip(kept, others, strict=True):
        walk.unify(a, b)
    return x


@rule("flip", "roll", "fft_fftshift", "fft_ifftshift")
def displaced(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Reversed, rolled and shifted dims stay whole; all of them where none is named."""
    terms, given = walk.of(args["self"]), args.get("dims", args.get("dim"))
    kind = "frequency" if "fft" in op_key(node) else "indexed"
    hold(walk, (terms[d] for d in dims_of(given or range(len(terms)), len(terms))), kind)
    return terms


def _pads(sizes: Sizes) -> None:
    """How many constants stand on each side, last dim first."""
    given = cast("list[int | fx.Node]", list(sizes.args.get("pad", ())))
    notes = {i: sizes.note(str(i)) for i in range(len(given))}
    nested = {i: dim for i, dim in notes.items() if dim is not None and dims.is_nested(dim)}
    if nested:
        sizes.set("pad", [sizes.at(nested[i]) if i in nested else n for i, n in enumerate(given)])


@rule("pad", "constant_pad_nd", sizes=_pads, fills=True)
@rule(
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def pad(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Padded dims: constants before and after the axis; other modes hold it whole.

    Constants are units like those that `zeros` makes: where a layer's outputs meet them they shrink
    as its width does (the shortcut of a residual net without weights).
    """
    names = list(args)
    terms, widths = list(walk.of(args["self"])), args[names[1]]
    constant = args.get("mode", "constant") == "constant" and names[1] == "pad"
    for i in range(len(widths) // 2):
        dim = len(terms) - 1 - i
        if walk.shape(args["self"])[dim] != walk.shape(node)[dim]:
            plain = constant and all(
                isinstance(w, int) and w >= 0 for w in widths[2 * i : 2 * i + 2]
            )
            padding = widths[2 * i : 2 * i + 2] if plain else None
            terms[dim] = _padded(walk, terms[dim], (i, padding), walk.shape(node)[dim])
    return tuple(terms)


def _padded(walk: Walk, term: Term, width: tuple[int, Sequence[int] | None], size: int) -> Term:
    from_last, given = width
    if given is not None:
        sides = [walk.fresh(n, name="padding") for n in given]
        for i, side in enumerate(sides):
            if given[i]:
                walk.note(str(2 * from_last + i), side)
        parts = ((sides[0], given[0]), (term, 1), (sides[1], given[1]))
        return axes.concatenate(p for p, n in parts if n)
    walk.fix(term, "padding")
    return walk.fresh(size, "padding")


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(walk: Walk, node: fx.Node, args: Args) -> Result:
    """[.., C r r, H, W] -> [.., C, H r, W r] and back; channel groups change places with
    channels.
    """
    del args
    name = op_key(node)
    terms, new = walk.of(node.args[0]), walk.shape(node)
    hold(walk, terms[-2:], "space")
    channels = _shuffled(walk, terms[-3], new[-3], name)
    space = tuple(walk.fresh(n, "space") for n in new[-2:])
    return (*terms[:-3], channels, *space)


def _shuffled(walk: Walk, term: Term, n: int, name: str) -> Term:
    size = axes.size(term)
    if "channel" in name:
        walk.fix(term, "indexed")
        return walk.fresh(n, "indexed")
    if "unshuffle" in name:
        return (*term, *walk.fresh(n // size, "space"))
    pieces = axes.regroup(term, [n, size // n])
    if pieces is None:
        walk.fix(term, "indexed")
        return walk.fresh(n, "indexed")
    walk.fix(pieces[1], "space")
    return pieces[0]


@rule("unfold")
def unfold(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Sliding windows over one dim, which stays whole."""
    terms, new = list(walk.of(args["self"])), walk.shape(node)
    dim: int = args["dimension"] % len(terms)
    walk.fix(terms[dim], "space")
    terms[dim] = walk.fresh(new[dim], "space")
    return (*terms, walk.fresh(new[-1], "space"))


@rule("col2im")
def col2im(walk: Walk, node: fx.Node, args: Args) -> Result:
    """[N, C kh kw, L] -> [N, C, H, W]"""
    terms, new = walk.of(args["self"]), walk.shape(node)
    if len(terms) != 3:
        return None
    size = walk.shape(args["self"])[1]
    pieces = axes.regroup(terms[1], [new[1], size // new[1]])
    if pieces is None:
        walk.fix(terms[1], "indexed")
        pieces = [walk.fresh(new[1], "indexed"), ()]
    hold(walk, (pieces[1], terms[2]), "space")
    return (terms[0], pieces[0], *(walk.fresh(n, "space") for n in new[2:]))


@rule("im2col")
def im2col(walk: Walk, node: fx.Node, args: Args) -> Result:
    """[N, C, H, W] -> [N, C kh kw, L]"""
    terms, new = walk.of(args["self"]), walk.shape(node)
    if len(terms) != 4:
        return None
    hold(walk, terms[2:], "space")
    window = walk.fresh(new[1] // walk.shape(args["self"])[1], "space")
    return (terms[0], (*terms[1], *window), walk.fresh(new[2], "space"))


@rule("diagonal")
def diagonal(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Two dims become their diagonal, which stays whole."""
    terms = walk.of(args["self"])
    dims = dims_of([args["dim1"], args["dim2"]], len(terms))
    hold(walk, (terms[d] for d in dims), "indexed")
    rest = tuple(t for i, t in enumerate(terms) if i not in dims)
    return (*rest, walk.fresh(walk.shape(node)[-1], "indexed"))
