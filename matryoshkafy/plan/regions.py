"""region(): a width that ends inside the trunk and meets a width again, computed once per size.

The scores of one attention head are such a case: q k' turns the width into positions, and the
product with the values is a width again. In masked nesting a unit of level l may read levels up to
l alone, so each level has scores of its own, from the prefix of q and k, and the values of that
level meet those. Every level then is a head of its own, nothing is held back, and the smallest size
is the single head that its class has.

    q, k  --contracted-->  scores, softmax, dropout  --meet-->  values
          (first)          (inner: once per size)     (blocks: each level its own)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from matryoshkafy import axes
from matryoshkafy.graph.nodes import gives_several
from matryoshkafy.plan.held import nests
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import op_of

# A longer stretch is a model of its own: it would be computed once per size, layers and all.
LONGEST = 24


@dataclass(frozen=True)
class Region:
    """What is computed once per size, and the nodes at which it meets a width again."""

    inner: frozenset[fx.Node]
    meetings: frozenset[fx.Node]


def region(first: fx.Node, found: Findings, known: Callable[[fx.Node], bool]) -> Region | None:
    """Return the region that starts where a width ends; None where one pass cannot hold it.

    Args:
        first: a node that contracts a width, or takes a statistic over it, into a whole value.
        found: the walk.
        known: tells whether a node is decided already (a mask, a norm) or computed per size.
    """
    if _nested_dims(first, found):
        return Region(frozenset(), frozenset({first})) if op_of(first).attends else None
    inner, meetings, queue = {first}, set[fx.Node](), [first]
    while queue:
        for user in queue.pop().users:
            if user.op != "call_function" or user in inner or user in meetings:
                continue
            if gives_several(user) or known(user) or len(inner) > LONGEST:
                return None
            if not _nested_dims(user, found):
                inner.add(user)
                queue.append(user)
            elif meets(user, found):
                meetings.add(user)
            else:
                return None
    return Region(frozenset(inner), frozenset(meetings)) if meetings else None


def meets(node: fx.Node, found: Findings) -> bool:
    """Tell whether a block of the node's one nested dim can be computed from that block alone."""
    summed = (*found.contracted.get(node, ()), *found.mixed.get(node, ()))
    dims, rank = _nested_dims(node, found), len(found.flat(node))
    if len(dims) != 1 or any(map(nests, summed)):
        return False
    if any(a.fixed and a.fixed.kind == "input" for a in axes.leaves(found.of(node)[dims[0]])):
        return False  # the batch beside it: where the block of a level ends, no graph can say
    return op_of(node).elementwise or (op_of(node).product and dims[0] >= rank - 2)


def _nested_dims(node: fx.Node, found: Findings) -> list[int]:
    return [d for d, term in enumerate(found.of(node)) if nests(term)]
