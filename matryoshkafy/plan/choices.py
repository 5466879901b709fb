"""hold_choices(): what a softmax chooses among stays whole: classes, positions, slots, atoms.

A softmax, and the logarithm of a sum of exponentials, share a whole out among alternatives. Where
they are classes of the model (tags of a CRF, components of a mixture, atoms of a distribution over
returns) no product reads them on. Where they are positions (keys that Linformer projects to a fixed
number, cells of a memory) they come out of a product that summed over the features of two values,
and go into one with the values of each. Clusters are written by one layer and meet themselves alone
(DiffPool). A width behind a softmax is none of these: a layer reads it (soft gates), or two layers
write what a product sums over (feature maps of linear attention).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Reason
from matryoshkafy.graph.nodes import reached
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.counts import alone
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import weight_places


def hold_choices(trace: Trace, found: Findings) -> None:
    """Fix the alternatives that a softmax chooses among."""
    read = _read(trace, found)
    for node in trace.graph.nodes:
        # What a node shares a whole out among; fused attention holds its own.
        for leaf in list(axes.leaves(*found.mixed.get(node, ()))) if op_of(node).shares else ():
            if leaf not in read:
                axes.fix((leaf,), Reason("classes", node.name))
            elif any(_compares(n, leaf, found) for n in _scores(node, leaf, found)):
                axes.fix((leaf,), Reason("attended", node.name))


def _read(trace: Trace, found: Findings) -> set[Axis]:
    """Return the axes that products sum over; numbers that the model holds for them read none.

    Nor does a layer that reads all features of all alternatives, one after the other (NetVLAD).
    """
    state = trace.state()

    def learns(weight: fx.Node) -> bool:
        made_of = reached([weight], lambda n: n.all_input_nodes)
        tensors = [state.get(str(n.target)) for n in made_of if n.op == "get_attr"]
        return any(t is not None and t.requires_grad for t in tensors)

    out: set[Axis] = set()
    written = _written_once(found)
    for node, terms in found.contracted.items():
        weights = [n for n in node.all_input_nodes if n in found.pure]
        leaves = {leaf for term in terms for leaf in alone(term)}
        if not weights or any(map(learns, weights)):
            out |= leaves if weights else leaves - written
    return out


def _written_once(found: Findings) -> set[Axis]:
    """Return the axes that one layer writes, once over: two halves of its outputs are two."""
    writers = Counter[Axis]()
    for weight, place in (p for n in found.contracted for p in weight_places(n).items()):
        for term in (found.flat(weight)[d] for d in place.outs):
            leaves = set(axes.leaves(term))
            writers.update(leaves if leaves == {*axes.resolve(term)} else [*leaves, *leaves])
    return {leaf for leaf, times in writers.items() if times == 1}


def _scores(node: fx.Node, leaf: Axis, found: Findings) -> Iterator[fx.Node]:
    """Yield the nodes that made what a softmax reads, before masks and scales."""
    made = {n for n in (*found.contracted, *found.mixed) if n is not node}

    def carriers(value: fx.Node) -> Iterable[fx.Node]:
        sources = () if value in made else value.all_input_nodes
        return [n for n in sources if leaf in set(axes.leaves(*found.flat(n)))]

    yield from reached([node], carriers) & made


def _compares(node: fx.Node, leaf: Axis, found: Findings) -> bool:
    """Tell whether a node sums over features, and no layer writes the axis there."""
    summed = axes.leaves(*found.contracted.get(node, ()), *found.mixed.get(node, ()))
    places = weight_places(node).items()
    written = axes.leaves(*(found.flat(w)[d] for w, place in places for d in place.outs))
    return any(a.fixed is None for a in summed) and leaf not in set(written)
