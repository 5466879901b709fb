"""Values made of parameters alone: which of them are weights, and what is held at full width.

A table of items divided by its lengths, learned latents passed through a layer, features of a
buffer spread over a graph: these are activations like any other, and every size computes its own
from what it keeps of the parameters. So is everything in sliced nesting, where each size is a pass
of its own. Two kinds of statistics are different:

- g v / |v|, torch's weight normalisation, is a reparametrisation. A smaller size keeps the prefix
  of the weight that it stands for, as if it had never been written so.
- In masked nesting one weight serves all sizes: a row of it cannot be normalised over as many
  inputs as each size has. Statistics of the rows of such a weight (standardisation) are taken at
  full width, and the plan says so. A number made of all of it (spectral normalisation) would make
  every row depend on units that small sizes do not keep: that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Term
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.nodes import bound_args, is_op, reached, source_of, sources_of
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import weight_places


def free(*terms: Term) -> list[Axis]:
    """Return the axes of terms that nest."""
    return [leaf for leaf in axes.leaves(*terms) if leaf.fixed is None]


def nests(term: Term) -> bool:
    """Tell whether a term shrinks."""
    return bool(free(term))


def is_reparametrised(node: fx.Node) -> bool:
    """Tell whether a sub-model keeps g v / |v| as it is: v becomes the cut weight and g its norm.

    Then the small model computes its weight as the user's class does, from the user's two names.
    """
    found = op_of(node).reparametrises
    return found and all(n.op == "get_attr" and len(n.users) == 1 for n in node.all_input_nodes)


def weights_of(found: Findings) -> set[fx.Node]:
    """Return the values made of parameters alone that are only read as weights which nest."""
    weights: set[fx.Node] = set()
    constant = _constant(found)
    # From the back: whether a value is only read as a weight is known of its readers first.
    for node in reversed(list(found.terms)):
        alone = node in found.pure and node in constant and bool(node.users)
        if alone and all(u in weights or _reads_weight(node, u, found) for u in node.users):
            weights.add(node)
    return weights


def held(found: Findings, *, masked: bool) -> list[fx.Node]:
    """Return the statistics of weights that are taken at full width, then cut.

    Raises:
        PlanError: in masked nesting, one of them is a number made of all of a weight.
    """
    weights = weights_of(found) if masked else set[fx.Node]()
    statistics: set[fx.Node] = set()
    for node in found.terms:
        over = (*found.mixed.get(node, ()), *found.contracted.get(node, ()))
        weight = node in weights or (node in found.pure and is_reparametrised(node))
        if node.op == "call_function" and weight and any(map(nests, over)):
            statistics.add(node)
    inner = _feeding(statistics)
    taken = [n for n in found.terms if n in statistics and n not in inner]
    if masked:
        _refuse_whole(taken, found)
    return taken


def _refuse_whole(statistics: Iterable[fx.Node], found: Findings) -> None:
    """Refuse numbers that are made of all of a weight which nests."""
    for node in statistics:
        if any(map(nests, found.flat(node))):
            continue
        made_of = reached([node], sources_of)
        tensors = {str(n.target): n for n in made_of if n in found.pure and n.op == "get_attr"}
        weights = sorted(tensors)
        # The one that has most of the axes: a vector beside it holds one side of it alone.
        whole = max(weights, key=lambda name: len(set(free(*found.flat(tensors[name])))))
        raise PlanError(
            f"{op_of(node).key} at {source_of(node) or node.name} makes one number of all of "
            f"{', '.join(weights)} (as spectral normalisation does); in masked nesting one weight "
            "serves every size, and the small ones would depend on units that they do not keep. "
            'Convert with nesting="sliced", where each size takes its own, or hold the weight '
            f"whole with keep=[{whole!r}]"
        )


def _feeding(statistics: set[fx.Node]) -> set[fx.Node]:
    """Return what only enters other statistics: it is part of them."""
    inner: set[fx.Node] = set()
    for node in reversed(list(next(iter(statistics)).graph.nodes) if statistics else []):
        if node.users and all(user in statistics or user in inner for user in node.users):
            inner.add(node)
    return inner


def _constant(found: Findings) -> set[fx.Node]:
    """Return the nodes that no argument of a call can change, not even in how often they repeat."""
    out: set[fx.Node] = set()
    for node in found.terms:
        if node.op != "placeholder" and all(n in out for n in node.all_input_nodes):
            out.add(node)
    return out


def _reads_weight(node: fx.Node, user: fx.Node, found: Findings) -> bool:
    """Tell whether an op reads a value as a weight whose outputs nest, or as a vector of a norm.

    Rows that are looked up are activations: each is normalised over the units of its own size.
    """
    if not is_op(user) or user in found.pure or op_of(user).lookup:
        return False
    places = weight_places(user)
    if node in places:
        terms = found.flat(node)
        return any(nests(terms[o]) for o in places[node].outs)
    return set(_slots(node, user)) <= set(op_of(user).weight_arguments())


def _slots(node: fx.Node, user: fx.Node) -> Iterator[str]:
    """Yield the names of the arguments that are the node, or hold it."""
    for name, value in bound_args(user).items():
        if _holds(value, node):
            yield name


def _holds(value: object, node: fx.Node) -> bool:
    several = isinstance(value, (list, tuple))
    return value is node or (several and any(v is node for v in cast("list[object]", value)))
