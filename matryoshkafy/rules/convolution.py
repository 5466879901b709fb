"""Convolutions: channels as in a linear; space is fixed but where a kernel spans it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import tensor_info
from matryoshkafy.rules.contraction import TRANSPOSED, add_bias
from matryoshkafy.rules.table import Args, Resizer, Result, Sizes, Terms, Walk, Weight, hold, rule


def group_count(name: str) -> Resizer:
    """The argument that counts groups, which are an axis of their own."""

    def resize(sizes: Sizes) -> None:
        groups = sizes.note("groups")
        if groups is not None and dims.is_nested(groups):
            # A group for each channel of each sample: the batch is a factor of the count.
            sizes.set(name, sizes.scaled(sizes.args[name], groups))

    return resize


_GROUPS = group_count("groups")


def _kernel(args: Args) -> dict[fx.Node, Weight]:
    """The weight of a convolution is summed over its channels, and over what it spans."""
    return {args["weight"]: Weight(out=0, into=(1, *_spanned(args)))}


@rule(
    *("conv1d", "conv2d", "conv3d"),
    weights=_kernel,
    parameters=("weight", "bias"),
    sizes=_GROUPS,
    nested="conv",
)
@rule("convolution", weights=_kernel, parameters=("weight", "bias"), sizes=_GROUPS)
def convolution(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Channels are contracted as in a linear; space is fixed; groups are one axis of their own."""
    x, weight = walk.of(args["input"]), walk.of(args["weight"])
    if args.get("transposed"):
        return transposed_convolution(walk, node, args)
    if len(x) != len(weight):
        hold(walk, (*x, *weight), "unbatched convolution")
        return tuple(walk.fresh(n, "unbatched convolution") for n in walk.shape(node))
    out, inner = weight[:2]
    # As many as the batch where every sample has a weight of its own: then the argument is a size.
    groups = walk.shape(args["input"])[1] // walk.shape(args["weight"])[1]
    if groups == 1:
        walk.contract(walk.unify(x[1], inner))
        walk.weight(args["weight"], 0, 1)
    else:
        out = _grouped(walk, args, (x[1], out, inner), groups)
    add_bias(walk, args["bias"], out)
    for dim in _spanned(args):
        walk.contract(walk.unify(x[dim], weight[dim]))
        walk.weight(args["weight"], dim)
    return (x[0], out, *_around(walk, node, args))


@rule(
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    weights={"weight": TRANSPOSED},
    parameters=("bias",),
    sizes=_GROUPS,
    nested="conv",
)
def transposed_convolution(walk: Walk, node: fx.Node, args: Args) -> Result:
    """The weight holds inputs first: [in, out / groups, ...]."""
    x, weight = walk.of(args["input"]), walk.of(args["weight"])
    if args["groups"] != 1:
        return _unsupported_groups(walk, node, args)
    walk.contract(walk.unify(x[1], weight[0]))
    walk.weight(args["weight"], 0, 1)
    _fix_space(walk, x, weight)
    add_bias(walk, args["bias"], weight[1])
    return (x[0], weight[1], *_space(walk, node))


def _unsupported_groups(walk: Walk, node: fx.Node, args: Args) -> Terms:
    x, weight = walk.of(args["input"]), walk.of(args["weight"])
    channels = walk.shape(node)[1]
    if walk.shape(args["weight"])[1] == 1 and args["groups"] == channels:
        walk.note("groups", x[1])
        walk.unify(x[1], weight[0])
        add_bias(walk, args["bias"], weight[0])
        _fix_space(walk, x, weight)
        return (x[0], weight[0], *_space(walk, node))
    hold(walk, (x[1], *weight), "groups")
    _fix_space(walk, x, weight)
    if isinstance(args["bias"], fx.Node):
        walk.fix(walk.of(args["bias"])[0], "groups")
    return (x[0], walk.fresh(channels, "groups"), *_space(walk, node))


def _space(walk: Walk, node: fx.Node) -> Terms:
    return tuple(walk.fresh(n, "space") for n in walk.shape(node)[2:])


def _fix_space(walk: Walk, x: Terms, weight: Terms) -> None:
    hold(walk, (*x[2:], *weight[2:]), "space")


def _around(walk: Walk, node: fx.Node, args: Args) -> Iterator[Term]:
    """Yield the terms of space: a dim that is treated alike at every position passes, as in a
    linear; one that is not spanned as a whole is fixed.
    """
    x, weight = walk.of(args["input"]), walk.of(args["weight"])
    spanned = _spanned(args)
    for dim, (size, new) in enumerate(
        zip(tensor_info(args["weight"]).shape[2:], _space(walk, node), strict=True), 2
    ):
        alike = size == 1 and _step(args, "stride", dim) == 1 and _step(args, "padding", dim) == 0
        if not alike and dim not in spanned:
            hold(walk, (x[dim], weight[dim]), "space")
        yield x[dim] if alike else new


def _spanned(args: Args) -> list[int]:
    """Return the dims of space that a kernel covers from end to end in one step: a vector of
    features that is read as an image of one row for each word.
    """
    x, weight = (tensor_info(args[n]).shape for n in ("input", "weight"))
    if args.get("transposed") or args["groups"] != 1 or len(x) != len(weight):
        return []
    return [d for d in range(2, len(x)) if x[d] == weight[d] > 1 and _step(args, "padding", d) == 0]


def _step(args: Args, name: str, dim: int) -> int:
    """Return a stride or padding along a dim; "same" is 0 for a kernel of 1."""
    given = args[name]
    if given == "same":
        return int(tensor_info(args["weight"]).shape[dim] != 1)
    if isinstance(given, str):
        return 0
    values = [given] if isinstance(given, int) else list(given)
    return values[0] if len(values) == 1 else values[dim - 2]


def _grouped(walk: Walk, args: Args, terms: tuple[Term, Term, Term], groups: int) -> Term:
    """Group g of the outputs reads group g of the inputs: the groups are shared, the rest is
    inner.
    """
    x, out, inner = terms
    n_in, n_out = walk.shape(args["weight"])[1], walk.shape(args["weight"])[0] // groups
    mine = walk.fresh(groups, name="groups")
    walk.unify(x, (*mine, *inner) if n_in > 1 else mine)
    walk.unify(out, (*mine, *walk.fresh(n_out, name="group.out")) if n_out > 1 else mine)
    walk.weight(args["weight"], 0)
    if n_in > 1:
        walk.contract(inner)
    walk.note("groups", mine)
    return out
