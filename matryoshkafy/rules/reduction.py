"""Ops that take statistics over an axis: norms, sums, softmax, sorting."""

from __future__ import annotations

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes import dims
from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import info_of, is_item, op_key
from matryoshkafy.rules.convolution import group_count
from matryoshkafy.rules.pieces import cut
from matryoshkafy.rules.pointwise import broadcast
from matryoshkafy.rules.table import Args, Result, Sizes, Terms, Walk, dims_of, rule


@rule(
    "layer_norm",
    statistic="normalise",
    sizes="normalized_shape",
    parameters=("weight", "bias"),
    nested="layer_norm",
)
@rule(
    "rms_norm",
    statistic="normalise",
    sizes="normalized_shape",
    parameters=("weight",),
    nested="rms_norm",
)
@rule("_fused_rms_norm", sizes="normalized_shape", parameters=("weight",))
@rule("native_layer_norm", sizes="normalized_shape", parameters=("weight", "bias"))
def norm_of_last(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Statistics over the trailing dims; weight and bias belong to them."""
    terms = walk.of(args["input"])
    dims = len(args["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(args.get(name), fx.Node):
            for mine, theirs in zip(walk.of(args[name]), terms[-dims:], strict=True):
                walk.unify(mine, theirs)
    for term in terms[-dims:]:
        walk.mix(term)
    shapes = walk.shapes(node)
    if len(shapes) == 1 and not isinstance(info_of(node), tuple):
        return terms
    kept = (*terms[:-dims], *((),) * dims)
    return (terms, *(kept for _ in shapes[1:]))


def _norm_groups(sizes: Sizes) -> None:
    """Whole groups where they are an axis; as many as divide the channels where a group holds units
    of several values, laid side by side.
    """
    channels = sizes.source[1]
    if sizes.note("groups") is not None or not dims.is_nested(channels):
        return group_count("num_groups")(sizes)
    at, full = sizes.at(channels), dims.size(channels)
    most = max(sizes.args["num_groups"] * at // full, 1)
    sizes.set("num_groups", next(n for n in range(most, 0, -1) if at % n == 0))
    return None


@rule(
    "group_norm",
    statistic="normalise",
    sizes=_norm_groups,
    parameters=("weight", "bias"),
    nested="group_norm",
)
def norm_of_groups(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Statistics over the channels of a group and over space: whole groups shrink.

    Where a group holds units of several values (the cat of a U-Net, whose parts are grouped
    otherwise) the units shrink, and the groups follow as those of a smaller class do.
    """
    del node
    terms, channels = walk.of(args["input"]), walk.shape(args["input"])[1]
    groups = args["num_groups"]
    pieces = axes.regroup(terms[1], [groups, channels // groups])
    _channel_vectors(walk, args, terms[1])
    if pieces is None:
        walk.mix(terms[1])
        walk.note("across", terms[1])
        return terms
    walk.mix(pieces[1])
    walk.note("groups", pieces[0])
    return terms


def _channel_vectors(walk: Walk, args: Args, term: Term) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(args.get(name), fx.Node) and walk.of(args[name]):
            walk.unify(walk.of(args[name])[0], term)


@rule(
    "batch_norm",
    "instance_norm",
    parameters=("weight", "bias", "running_mean", "running_var"),
)
def batch_norm(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Every channel has statistics of its own."""
    del node
    terms = walk.of(args["input"])
    _channel_vectors(walk, args, terms[1])
    for term in terms[2:]:
        walk.mix(term)
    return terms


def _reduced(walk: Walk, node: fx.Node, args: Args, source: object) -> Terms:
    """Drop (or keep at size 1) the reduced dims, recording the statistic."""
    terms = walk.of(source)
    dim = args.get("dim")
    dims = dims_of(range(len(terms)) if dim is None or dim == [] else dim, len(terms))
    for d in dims:
        walk.mix(terms[d])
    if len(walk.shapes(node)[0]) == len(terms):
        return tuple(() if i in dims else t for i, t in enumerate(terms))
    return tuple(t for i, t in enumerate(terms) if i not in dims)


def _each(node: fx.Node, terms: Terms) -> Result:
    """Every output of the op has the same dims."""
    found = info_of(node)
    return (terms,) * len(found) if isinstance(found, tuple) else terms


@rule("mean", statistic="mean")
@rule("sum", statistic="sum")
@rule("var", statistic="var")
@rule("std", statistic="std")
@rule("amax", statistic="amax")
@rule("amin", statistic="amin")
@rule("linalg_vector_norm", "norm", statistic="norm")
@rule("prod", clamps=True)
@rule("logsumexp", clamps=True, shares=True)
@rule("nansum", adds=True)
@rule(
    "any",
    "all",
    "var_mean",
    "std_mean",
    "count_nonzero",
    "nanmean",
    "aminmax",
)
def reduce_dims(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Statistics over dims."""
    terms = _reduced(walk, node, args, args["self"])
    return _each(node, terms)


@rule("argmax", "argmin")
def chosen(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Which unit is the largest: a number among all of them, so that they stay whole."""
    _hold_counted(walk, args)
    return reduce_dims(walk, node, args)


@rule("max", "min", clamps=True)
@rule("median", "nanmedian", "mode")
def extreme(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A statistic over a dim, with the number of its unit; torch.max of two tensors is
    pointwise.
    """
    if isinstance(args.get("other"), fx.Node):
        return broadcast(walk, [args["self"], args["other"]])
    if _numbers_read(node):
        _hold_counted(walk, args)
    return reduce_dims(walk, node, args)


def _numbers_read(node: fx.Node) -> bool:
    """Tell whether the second of (values, numbers of units) is used."""
    return any(is_item(u) and u.args[1] == 1 and u.users for u in node.users)


def _hold_counted(walk: Walk, args: Args) -> None:
    """Hold the dims whose units an op counts; all of them where it names none."""
    terms, dim = walk.of(args["self"]), args.get("dim")
    for d in range(len(terms)) if dim is None else dims_of(dim, len(terms)):
        walk.fix(terms[d], "indexed")


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "_safe_softmax", shares=True)
@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def along(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Every output unit sees the units of one dim, which is mixed."""
    if op_key(node) in ("cummax", "cummin") and _numbers_read(node):
        _hold_counted(walk, args)
    terms = walk.of(args["self"])
    dim: int = args["dim"] % len(terms) if terms else 0
    if terms:
        walk.mix(terms[dim])
    return _each(node, terms)


@rule("diff")
def diff(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Neighbours along a dim, which stays whole."""
    terms = list(walk.of(args["self"]))
    dim: int = args["dim"] % len(terms)
    walk.fix(terms[dim], "indexed")
    terms[dim] = walk.fresh(walk.shape(node)[dim], "indexed")
    return tuple(terms)


@rule("topk", "sort", "argsort", "kthvalue")
def sorting(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Order along a dim holds it whole."""
    terms = list(walk.of(args["self"]))
    dim: int = args.get("dim", -1) % len(terms)
    walk.fix(terms[dim], "indexed")
    shape = walk.shapes(node)[0]
    if len(shape) == len(terms):
        terms[dim] = walk.fresh(shape[dim], "indexed")
    else:
        del terms[dim]
    return _each(node, tuple(terms))


@rule("renorm")
def renorm(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """Each slice along one dim is scaled to a length, a statistic over the other dims."""
    del node
    terms = walk.of(args["self"])
    for d, term in enumerate(terms):
        if d != args["dim"] % len(terms):
            walk.mix(term)
    return terms


@rule("glu")
def glu(walk: Walk, node: fx.Node, args: Args) -> Result:
    """The first half times the sigmoid of the second: two copies of one axis."""
    terms = list(walk.of(args["self"]))
    dim: int = args["dim"] % len(terms)
    half = walk.shape(node)[dim]
    first, second = cut(walk, terms[dim], [half, half])
    terms[dim] = walk.unify(first, second)
    return tuple(terms)


@rule("cosine_similarity", clamps=True)
@rule("pairwise_distance", adds=True)
def pair_similarity(walk: Walk, node: fx.Node, args: Args) -> Result:
    """A statistic over one dim of two tensors."""
    names = list(args)
    terms = broadcast(walk, [args[names[0]], args[names[1]]])
    dim: int = args.get("dim", -1) % len(terms)
    walk.mix(terms[dim])
    if len(walk.shape(node)) == len(terms):
        return (*terms[:dim], (), *terms[dim + 1 :])
    return (*terms[:dim], *terms[dim + 1 :])


@rule("cdist", clamps=True, adds=True)
@rule("_cdist_forward", adds=True)
def cdist(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Distances between rows: the feature axis is mixed away."""
    del node
    a, b = walk.of(args["x1"]), walk.of(args["x2"])
    walk.mix(walk.unify(a[-1], b[-1]))
    batch = a[:-2] if len(a) >= len(b) else b[:-2]
    return (*batch, a[-2], b[-2])
