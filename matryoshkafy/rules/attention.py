"""Scaled dot product attention: heads are batch-like, the feature axis of q and k is contracted."""

from __future__ import annotations

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Term
from matryoshkafy.rules.table import Args, Terms, Walk, rule


@rule("scaled_dot_product_attention", clamps=True, factor="scale", attends=True)
def attention(walk: Walk, node: fx.Node, args: Args) -> Terms:
    """softmax(q k' / sqrt(E)) v, with grouped query heads where asked for."""
    q, k, v = (walk.of(args[n]) for n in ("query", "key", "value"))
    batch = list(q[:-2])
    for other in (k, v):
        for i, (mine, theirs) in enumerate(zip(batch[::-1], other[:-2][::-1], strict=False)):
            at = len(batch) - 1 - i
            batch[at] = _heads(walk, mine, theirs)
    walk.contract(walk.unify(q[-1], k[-1]))
    walk.fix(walk.unify(k[-2], v[-2]), "attended")
    if isinstance(args.get("attn_mask"), fx.Node):
        _mask(walk, walk.of(args["attn_mask"]), (*batch, q[-2], k[-2]))
    del node
    return (*batch, q[-2], v[-1])


def _heads(walk: Walk, mine: Term, theirs: Term) -> Term:
    """Grouped-query attention: each kv head serves n query heads in a row."""
    n, m = axes.size(mine), axes.size(theirs)
    if n == m:
        return walk.unify(mine, theirs)
    if m and n % m == 0 and m > 1:
        walk.unify(mine, (*theirs, *axes.copies(n // m)))
    return mine if n >= m else theirs


def _mask(walk: Walk, mask: Terms, scores: Terms) -> None:
    for mine, theirs in zip(mask[::-1], scores[::-1], strict=False):
        if mine and theirs and axes.size(mine) == axes.size(theirs):
            walk.unify(mine, theirs)
