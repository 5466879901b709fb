"""hold_counts(): factors that count copies of a width stay whole, and the width shrinks.

Of a product the outermost free factor nests, which gives whole heads: 8 heads of 64 units become 4
heads of 64. Four kinds of products are made otherwise, and nobody's class has fewer copies:

- Three linear pieces of a maxout, two rows of a capsule: one layer writes copies x width, and the
  width alone is what other layers write and read. The copies are counted, never read by a layer.
- A channel shuffle lays groups x units down again as units x groups. One order of the two would
  shrink the groups, the other the units; the smaller factor is the number of groups.
- Four numbers for each of two gates, added up: no layer reads them.
- Two positions that a layer writes for each one (SEW's upsampling): length x 2 is a length.

So does the state of a recurrence: Mamba's A has a row of numbers for each unit, which multiply that
unit. What rows of such a parameter hold is read by no layer, where the units are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import COPIES, Axis, Reason, Sum, Term
from matryoshkafy.graph.nodes import bound_args, is_tensor, reached, readers_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.tables import weights_read
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import op_of

KIND = "copies"


def hold_counts(trace: Trace, found: Findings) -> None:
    """Fix the factors that count copies of what shrinks."""
    sides = _Sides(trace, found)
    products = _products(found)
    for term in products:
        _hold_positions(term, sides)
        _hold_copies(term, sides)
    _hold_shuffled(products, _left_open(trace, found))
    _hold_summed(found, products, sides)
    _hold_states(trace, found, sides)


class _Sides:
    """The axes that layers write and read, as part of a dim, and as all of it."""

    def __init__(self, trace: Trace, found: Findings) -> None:
        self.written, self.read = set[Axis](), set[Axis]()
        self.written_alone, self.read_alone = set[Axis](), set[Axis]()
        for node in trace.graph.nodes:
            if node.op != "call_function" or node not in found.terms:
                continue
            for weight, place in weights_read(node, found).items():
                terms = found.flat(weight)
                for term in (terms[o] for o in place.outs):
                    self.written.update(axes.leaves(term))
                    self.written_alone.update(alone(term))
                for term in (terms[i] for i in place.into):
                    self.read.update(axes.leaves(term))
                    self.read_alone.update(alone(term))

    def is_passed(self, axis: Axis) -> bool:
        """Tell whether a layer writes the axis and another reads it."""
        return axis in self.written and axis in self.read

    def is_width(self, axis: Axis) -> bool:
        """Tell whether layers write the axis alone and read it alone."""
        return axis in self.written_alone and axis in self.read_alone

    def is_count(self, axis: Axis) -> bool:
        """Tell whether no layer has the axis alone, nor passes it on to another layer."""
        return not (self.is_passed(axis) or axis in self.written_alone | self.read_alone)


def alone(term: Term) -> Iterator[Axis]:
    """Yield the axes that are all of a dim, or all of a segment of it, copies not counted."""
    factors = [f for f in axes.resolve(term) if not (isinstance(f, Axis) and f.fixed is COPIES)]
    if len(factors) == 1 and isinstance(factors[0], Axis):
        yield factors[0]
    elif len(factors) == 1 and isinstance(factors[0], Sum):
        for segment in factors[0].segments:
            yield from alone(segment)


def _products(found: Findings) -> list[Term]:
    """Return the terms of several factors."""
    resolved = (axes.resolve(term) for term in found.all_terms())
    return [term for term in resolved if len(term) > 1]


def _hold_positions(term: Term, sides: _Sides) -> None:
    """What is laid beside the positions of an input are positions: a layer wrote several of them
    for each one. Beside samples stand heads.
    """
    for outer, axis in itertools.pairwise(term):
        if not (isinstance(outer, Axis) and outer.fixed and isinstance(axis, Axis) and _free(axis)):
            continue
        place = outer.fixed.kind == "space" or (
            outer.fixed.kind == "input" and not outer.name.endswith(".dim0")
        )
        if place and sides.is_count(axis):
            axis.fixed = Reason(KIND, outer.name)


def _hold_copies(term: Term, sides: _Sides) -> None:
    widths = (i for i, f in enumerate(term) if isinstance(f, Axis) and _free(f))
    at = next((i for i in widths if sides.is_width(term[i])), 0)  # type: ignore[arg-type]
    for leaf in axes.leaves(term[:at]):
        if _free(leaf) and sides.is_count(leaf):
            leaf.fixed = Reason(KIND, term[at].name)  # type: ignore[union-attr]


def _hold_shuffled(products: list[Term], left_open: set[Axis]) -> None:
    """Where two factors stand in both orders one counts groups: the one that the code writes out
    where it leaves the other open (-1), else the smaller.
    """
    orders: dict[tuple[Axis, Axis], None] = {}  # in the order of the graph
    for term in products:
        free = [f for f in term if isinstance(f, Axis) and _free(f)]
        orders |= {(a, b): None for i, a in enumerate(free) for b in free[i + 1 :] if a is not b}
    for a, b in orders:
        told = (a in left_open) != (b in left_open)
        if (b, a) in orders and (b in left_open if told else a.size < b.size):
            a.fixed = a.fixed or Reason(KIND, b.name)


def _left_open(trace: Trace, found: Findings) -> set[Axis]:
    """Return the axes that a view splits off and leaves open: view(n, groups, -1)."""
    out = set[Axis]()
    for node in (n for n in trace.graph.nodes if n in found.terms and op_of(n).picks):
        named = op_of(node).sizes
        shape: Sequence[object] = bound_args(node)[named] if isinstance(named, str) else ()
        if -1 in shape:
            whole = {leaf for term in found.flat(node.all_input_nodes[0]) for leaf in alone(term)}
            out.update(set(alone(found.flat(node)[shape.index(-1)])) - whole)
    return out


def _hold_summed(found: Findings, products: list[Term], sides: _Sides) -> None:
    """A factor of what a layer writes that is only added up is a number of the class: 2 x 4 of
    WavLM's gates. An axis that stands alone may be a hidden width, read by a sum of ones.
    """
    summed = set(axes.leaves(*_sums(found)))
    met = {leaf for terms in found.contracted.values() for leaf in axes.leaves(*terms)}
    for leaf in axes.leaves(*products):
        if leaf in (summed - met) & (sides.written - sides.read):
            leaf.fixed = leaf.fixed or Reason(KIND, leaf.name)


def _sums(found: Findings) -> Iterator[Term]:
    """Yield what sums add up of a layer's own numbers; a sum of products compares two values."""
    for node, terms in found.mixed.items():
        if op_of(node).statistic == "sum" and _is_layers(node, found):
            yield from terms


def _is_layers(node: fx.Node, found: Findings) -> bool:
    """Tell whether a value is made of a layer's outputs, and of no other value beside them."""
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]
    return node in found.contracted or len(inputs) == 1 and _is_layers(inputs[0], found)


def _hold_states(trace: Trace, found: Findings, sides: _Sides) -> None:
    """A parameter of several widths that meets activations element by element: what no layer reads
    of it is a state, if another of its axes is a width of the layers.
    """
    for node in trace.graph.nodes:
        if node.op != "get_attr" or node not in found.terms or not _meets_units(node, found):
            continue
        mine = dict.fromkeys(axes.leaves(*found.flat(node)))
        states = [leaf for leaf in mine if leaf not in sides.read]
        # Without a width beside it nothing says that the rest are states, and not units.
        if any(map(sides.is_passed, mine)):
            axes.fix(tuple(states), Reason("state", str(node.target)))


def _meets_units(parameter: fx.Node, found: Findings) -> bool:
    """Tell whether activations meet a parameter, or what is made of it alone, unit by unit."""
    made = reached([parameter], lambda n: [u for u in readers_of(n) if u in found.pure])
    users = [u for n in made for u in readers_of(n) if u not in found.pure and is_tensor(u)]
    return bool(users) and all(op_of(u).elementwise for u in users)


def _free(axis: Axis) -> bool:
    return axis.fixed is None
