"""Ops that pick units by index: the picked dim stays whole, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import op_key, tensor_info
from matryoshkafy.rules.contraction import LEFT, RIGHT
from matryoshkafy.rules.pointwise import broadcast
from matryoshkafy.rules.table import Args, Result, Terms, Walk, hold, meet, rule

Picks = Sequence[fx.Node | None]


def _index_terms(walk: Walk, x: Terms, indices: Picks) -> tuple[list[int], list[fx.Node]]:
    """Return the indexed dims of x, with the index tensors; boolean masks cover several dims."""
    dims: list[int] = []
    at = 0
    for index in indices:
        mask = isinstance(index, fx.Node) and str(tensor_info(index).dtype) in (
            "torch.bool",
            "torch.uint8",
        )
        width = len(walk.shape(index)) if mask else 1
        if index is not None:
            dims.extend(range(at, at + width))
        at += width
    return dims, [i for i in indices if i is not None]


@rule("index", "_unsafe_index", picks=True, lookup=True)
def index(walk: Walk, node: fx.Node, args: Args) -> Result:
    """x[i, :, j]: the broadcast indices stand where the first of adjacent indexed dims stood."""
    x = walk.of(args["self"])
    dims, tensors = _index_terms(walk, x, args["indices"])
    hold(walk, (x[d] for d in dims), "indexed")
    if dims == [0] and len(x) == 2:  # rows of a table: its columns are features, as an embedding's
        walk.weight(args["self"], 1)
    masks = any(str(tensor_info(t).dtype) == "torch.bool" for t in tensors)
    new = walk.shape(node)
    count = len(new) - (len(x) - len(dims))
    picked = _picked(walk, tensors, masks, new, (dims, count))
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if adjacent else 0
    rest = [t for d, t in enumerate(x) if d not in dims]
    return (*rest[:at], *picked, *rest[at:])


# The indexed dims, and how many dims stand for them.
Place = tuple[Sequence[int], int]


def _picked(
    walk: Walk, tensors: Sequence[fx.Node], masks: bool, new: tuple[int, ...], place: Place
) -> Terms:
    dims, count = place
    if not masks:
        return broadcast(walk, list(tensors))
    for tensor in tensors:
        hold(walk, walk.of(tensor), "indexed")
    return tuple(walk.fresh(n, "indexed") for n in new[dims[0] : dims[0] + count])


@rule("index_put", "_unsafe_index_put", "index_put_")
def index_put(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """x[i] = v: indexed dims stay whole, the others meet the values."""
    del node
    x, values = walk.of(args["self"]), walk.of(args["values"])
    dims, tensors = _index_terms(walk, x, args["indices"])
    hold(walk, (x[d] for d in dims), "indexed")
    for tensor in tensors:
        hold(walk, walk.of(tensor), "indexed")
    trailing = x[max(dims, default=-1) + 1 :]
    meet(walk, trailing, values)
    hold(walk, values[: max(0, len(values) - len(trailing))], "indexed")
    hold(walk, x[: max(dims, default=0)], "indexed")
    return x


@rule("index_select", picks=True, lookup=True)
def index_select(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Units of one dim by number; the columns of a table are features."""
    terms = list(walk.of(args["self"]))
    dim: int = args["dim"] % len(terms)
    if dim == 0 and len(terms) == 2:
        walk.weight(args["self"], 1)
    walk.fix(terms[dim], "indexed")
    terms[dim] = walk.fresh(walk.shape(node)[dim], "indexed")
    return tuple(terms)


@rule("gather", "take_along_dim", picks=True)
def gather(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Along one dim by index; the other dims of x and index are the same where their sizes are."""
    x, i = walk.of(args["self"]), walk.of(args.get("index", args.get("indices")))
    if args.get("dim") is None:
        return None
    dim: int = args["dim"] % len(x)
    same = walk.shape(args["self"]), walk.shape(node)
    out: list[Term] = []
    for d, (mine, theirs) in enumerate(zip(x, i, strict=True)):
        if d == dim:
            walk.fix(mine, "indexed")
            out.append(theirs)
        elif same[0][d] == same[1][d]:
            out.append(walk.unify(mine, theirs) if mine and theirs else (mine or theirs))
        else:
            walk.fix(mine, "indexed")
            out.append(theirs)
    return tuple(out)


@rule(
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "index_fill",
    "index_reduce",
)
def scatter(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Along one dim by index, into x."""
    x = walk.of(args["self"])
    dim: int = args["dim"] % len(x)
    name = op_key(node)
    walk.fix(x[dim], "indexed")
    for key in ("index", "src", "source"):
        value = args.get(key)
        if isinstance(value, fx.Node):
            _meet(walk, x, walk.of(value), (dim, "index_" in name and key == "index"))
    return x


def _meet(walk: Walk, x: Terms, other: Terms, place: tuple[int, bool]) -> None:
    dim, vector = place
    if vector or len(other) != len(x):
        hold(walk, other, "indexed")
        return
    for d, (mine, theirs) in enumerate(zip(x, other, strict=True)):
        if d == dim:
            walk.fix(theirs, "indexed")
        elif mine and theirs:
            walk.unify(mine, theirs)


@rule("_grouped_mm", weights={"self": LEFT, "mat2": RIGHT}, product=True)
def grouped_mm(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Rows sorted by expert, each group times its own matrix [experts, in, out]."""
    del node
    a, b = walk.of(args["self"]), walk.of(args["mat2"])
    if len(a) != 2 or len(b) != 3:
        return None
    walk.contract(walk.unify(a[-1], b[-2]))
    walk.weight(args["mat2"], -1, -2)
    walk.fix(b[0], "experts")
    return (a[0], b[2])
