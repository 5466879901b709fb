"""Ops that make tensors from numbers: their dims are free until something they meet is not."""

from __future__ import annotations

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import info_of
from matryoshkafy.rules.table import Args, Result, Sizes, Terms, Walk, hold, rule


@rule("zeros", "ones", "rand", "randn", "new_zeros", "new_ones", "randint", sizes="size")
@rule("full", "new_full", sizes="size", fills=True, factor="fill_value")
def filled(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Every unit is made alike."""
    del args
    return tuple(walk.fresh(n, name="filled") for n in walk.shape(node))


def _end(sizes: Sizes) -> None:
    """The units that stay are the first."""
    ((out,),) = sizes.outputs
    if dims.is_nested(out):
        sizes.set("end", sizes.args.get("start", 0) + sizes.at(out))


@rule("arange", sizes=_end, counts=True)
def arange(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """a, a + 1, a + 2, ...: a prefix is a shorter range, so the end may shrink."""
    plain = all(
        isinstance(v, int) for v in (args.get("start", 0), args.get("end"), args.get("step", 1))
    )
    free = plain and args.get("step", 1) == 1
    return tuple(walk.fresh(n, None if free else "range", "range") for n in walk.shape(node))


@rule("scalar_tensor", fills=True)
@rule("sym_size", "sym_numel", "size", "numel", measures=True)
@rule(
    "linspace",
    "logspace",
    "eye",
    "tril_indices",
    "triu_indices",
    "one_hot",
    "tensor",
    "randperm",
    "hann_window",
    "hamming_window",
    "nonzero",
    "bincount",
    "histc",
    "unique_dim",
    "_unique2",
    "bucketize",
    "searchsorted",
    "isin",
    "masked_select",
    "take",
    "as_strided",
)
def count_up(walk: Walk, node: fx.Node, args: Args) -> Result:
    """Values depend on the size, or on places among all units: whole."""
    for value in args.values():
        hold(walk, walk.of(value), "indexed")
    if isinstance(info_of(node), tuple):
        return tuple(tuple(walk.fresh(n, "indexed") for n in s) for s in walk.shapes(node))
    return tuple(walk.fresh(n, "indexed") for n in walk.shape(node))
