"""What nests: the policies that decide which axes are widths, and which stay whole and why.

In order: what the user keeps stays whole; an axis nests only if it is a feature
(in or out of a contraction with a parameter, or the columns of an embedding); of a product only the
outermost free factor nests; an output axis that nothing contracts is a head and stays whole; in
masked nesting a width that is contracted into a whole axis either ends in the tail, is demoted, or
is clamped to the smallest size.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from torch import fx, nn

from matryoshkafy import axes
from matryoshkafy.axes.terms import COPIES, Axis, Reason, Sum, Term
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.nodes import output_node
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.held import free, nests
from matryoshkafy.plan.scalars import KEEP
from matryoshkafy.plan.tables import weights_read
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import Terms, op_of
from matryoshkafy.rules.bounds import is_cap

ByName = Mapping[str, Terms]  # the terms of each parameter and buffer


def parameter_terms(trace: Trace, found: Findings) -> dict[str, Terms]:
    out: dict[str, Terms] = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr" and node in found.terms and node.target != "training":
            out[str(node.target)] = found.of(node)
    return out | _aliases(trace, out)


def _aliases(trace: Trace, read: ByName) -> dict[str, Terms]:
    """Ties stay ties: a second name of a tensor that the graph reads has the same axes."""
    state = trace.state()
    owners = {id(state[name]): name for name in read if name in state}
    return {n: read[owners[id(t)]] for n, t in state.items() if n not in read and id(t) in owners}


def hold_kept(trace: Trace, found: Findings, patterns: Sequence[str]) -> None:
    patterns = [p for p in patterns if not p.startswith(KEEP)]
    used: set[str] = set()
    for node in trace.graph.nodes:
        name = str(node.target) if node.op == "get_attr" else node.name
        matching = [p for p in patterns if _names(p, name)]
        used.update(matching)
        for term in found.flat(node) if matching else ():
            axes.fix(term, Reason("kept", matching[0]))
    missing = [p for p in patterns if p not in used]
    if missing:
        raise PlanError(
            f"keep={missing[0]!r} matches no parameter, module or node; use a name such as "
            f"{next((str(n.target) for n in trace.graph.nodes if n.op == 'get_attr'), '')!r}"
        )


def _names(pattern: str, name: str) -> bool:
    """Tell whether a pattern of `keep` means a tensor, a node, or the module that holds it."""
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatch(name, pattern)


# An output of at most so many units, in a model whose largest width is four times that, is a head
# though a residual unit on the classes reads it once more.
FEW = 8


def fix_heads(trace: Trace, found: Findings) -> None:
    """An output axis that nothing contracts is classes or vocabulary: it stays whole.

    A pooled representation (behind a nonlinearity) is no head although nothing contracts it here;
    logits that are bounded by cap * tanh(logits / cap) are, and what only a softmax sums over.
    """
    largest = max((axes.size(t) for t in found.features), default=0)
    summed: set[Axis] = set()
    for node, terms in (*found.contracted.items(), *found.mixed.items()):
        if not op_of(node).shares:
            summed.update(axes.leaves(*terms))
    # What an activation reads is a representation: somebody goes on from it, if not this forward.
    for node in found.terms:
        if op_of(node).nonlinear and node not in found.pure and not is_cap(node):
            summed.update(axes.leaves(*found.flat(node)))
    output = output_node(trace.graph)
    for node in output.all_input_nodes:
        for term in found.flat(node):
            # The dim is judged, not its factors: four groups of 16 channels are no four classes.
            few = axes.size(term) <= FEW and axes.size(term) * 4 <= largest
            for leaf in (a for a in axes.leaves(term) if few or a not in summed):
                leaf.fixed = leaf.fixed or Reason("classes", node.name)


def settle(found: Findings) -> None:
    """Fix what is no feature, then all but the outermost free factor of every product."""
    features = set(axes.leaves(*found.features))
    products: dict[str, Term] = {}
    for term in (*found.all_terms(), *_sides(found)):
        resolved = axes.resolve(term)
        for leaf in axes.leaves(resolved):
            if leaf.fixed is None and leaf not in features:
                leaf.fixed = Reason("no feature")
        # One product a set of leaves is enough: thousands of values share the dims of the stream.
        if len(resolved) > 1 or any(isinstance(f, Sum) for f in resolved):
            products[str([id(leaf) for leaf in axes.leaves(resolved)])] = resolved
    # To a fixed point: an axis fixed as inner here may be the outermost of another product, whose
    # next factor is then free to nest. A list, so that every product is visited in each round.
    changed = True
    while changed:
        changed = any([_outermost(term) for term in products.values()])


def _sides(found: Findings) -> Iterator[Term]:
    """Yield what a layer writes or sums over as one product: heads and their units as two dims."""
    for node in found.contracted:
        for weight, place in weights_read(node, found).items():
            terms = found.flat(weight)
            for dims in (dims for dims in (place.outs, place.into) if len(dims) > 1):
                side = tuple(factor for d in sorted(dims) for factor in terms[d])
                yield from [side] if _stands_together(side, node, weight, found) else []


def _stands_together(side: Term, node: fx.Node, weight: fx.Node, found: Findings) -> bool:
    """Tell whether one value beside the weight has all of a side; a bilinear layer reads two."""
    wanted = set(axes.leaves(side))
    if len(wanted) < len(list(axes.leaves(side))):
        return False
    values = (n for n in (node, *node.all_input_nodes) if n is not weight and n in found.terms)
    return any(wanted <= set(axes.leaves(*found.flat(n))) for n in values)


def _outermost(term: Term) -> bool:
    """Fix every free factor inside the outermost free one; tell whether anything changed."""
    changed, nested = False, False
    for factor in term:
        mine = free((factor,))
        if nested:
            changed |= bool(mine)
            for leaf in mine:
                leaf.fixed = Reason("inner", leaf.name)
        elif isinstance(factor, Sum):
            # Segments lie side by side, none inside another: each may keep an outermost axis.
            changed |= any([_outermost(axes.resolve(s)) for s in factor.segments])
        nested = nested or any(leaf.fixed is None for leaf in mine)
    return changed


def _inside_products(parameters: ByName) -> set[Axis]:
    """Return the axes that are one factor among several of some dimension, copies not counted."""
    inside: set[Axis] = set()
    for term in (t for terms in parameters.values() for t in terms):
        resolved = axes.resolve(term)
        if len([f for f in resolved if not (isinstance(f, Axis) and f.fixed is COPIES)]) > 1:
            inside.update(axes.leaves(resolved))
    return inside


def only_feed_forward(trace: Trace, found: Findings, parameters: ByName) -> None:
    """Keep the hidden axes between two contractions with the residual stream, fix the rest.

    An attention head axis is a factor of a product (heads x head_dim), a hidden axis stands alone.
    """
    main = heaviest(trainable(trace, parameters))
    inside = _inside_products(parameters)
    partners: dict[Axis, set[Axis]] = {}
    for terms in parameters.values():
        nested = [set(free(term)) for term in terms]
        for i, mine in enumerate(nested):
            others: set[Axis] = set[Axis]().union(*(f for j, f in enumerate(nested) if j != i))
            for leaf in mine:
                partners.setdefault(leaf, set()).update(others)
    # Two matrices share a hidden axis, each with the stream on its other side. An axis that meets
    # anything else (heads meet head_dim, classes meet nothing) is none.
    for leaf, others in partners.items():
        hidden = leaf is not main and leaf not in inside and others == {main}
        if not hidden and leaf.fixed is None:
            leaf.fixed = Reason("scope", "ffn")
    for leaf in axes.leaves(*found.all_terms()):
        if leaf.fixed is None and leaf not in partners:
            leaf.fixed = Reason("scope", "ffn")


def trainable(trace: Trace, parameters: ByName) -> dict[str, Terms]:
    """Leave out buffers, whose size says nothing of the model's; keep them where there is no
    other.
    """
    state = trace.state()
    # Reversed, so that the first name of a tied tensor wins and is counted once.
    once = {id(state[n]): n for n in reversed(list(parameters)) if n in state}
    names = [n for n in once.values() if isinstance(state[n], nn.Parameter)]
    return {n: t for n, t in parameters.items() if n in names} or dict(parameters)


def heaviest(parameters: ByName) -> Axis | None:
    mine = shares(parameters)
    return max(mine, key=lambda axis: mine[axis]) if mine else None


def shares(parameters: ByName) -> dict[Axis, float]:
    """Return for every free axis the part of all parameters that it belongs to."""
    weight: Counter[Axis] = Counter()
    whole = 0
    for terms in parameters.values():
        total = math.prod(max(axes.size(term), 1) for term in terms)
        whole += total
        for leaf in set(free(*terms)):
            weight[leaf] += total
    return {axis: total / whole for axis, total in weight.most_common()}


# What an input may hold of the parameters before the plan says how to let it go.
HELD_BY_INPUT = 0.2


def input_remarks(trace: Trace, parameters: ByName) -> Iterator[str]:
    """Say which inputs hold much of the model: a stack of layers without its embedding, which add
    to what they are called with, keeps that width, unless smaller sizes are called with less.
    """
    held: Counter[str] = Counter()
    whole = 0
    # Only what some weight writes (its dim 0) could have shrunk had the input not held it.
    written = {leaf for terms in parameters.values() if len(terms) > 1 for leaf in _held(terms[0])}
    for terms in parameters.values():
        total = math.prod(max(axes.size(term), 1) for term in terms)
        whole += total
        stream = {leaf for term in terms for leaf in _held(term)} & written
        for place in {leaf.fixed.place for leaf in stream if leaf.fixed}:
            held[place] += total
    names = input_names(trace)
    for place, total in held.most_common():
        if total > HELD_BY_INPUT * whole and place in names:
            yield (
                f"whole width: {total / whole:.0%} of the parameters have an axis of the input "
                f"{names[place]!r} and keep it; where smaller sizes are called with a narrower "
                f"one, give free=[{names[place]!r}]"
            )


def table_remarks(trace: Trace, parameters: ByName) -> Iterator[str]:
    """Say which tensors nest that the state_dict does not show: slopes, sines of positions. A slice
    has the first units of them, as the doll at its size; the user's class would compute its own.
    """
    hidden = [n for n in parameters if not trace.is_persistent(n)]
    names = [repr(n) for n in hidden if any(nests(term) for term in parameters[n])]
    if names:
        yield (
            f"tables: of {', '.join(names)} every size has the first units, as of a parameter; the "
            "state_dict does not hold them, and a class built at that size computes its own"
        )


def _held(term: Term) -> Iterator[Axis]:
    """Yield the axes that an input holds."""
    return (a for a in axes.leaves(term) if a.fixed is not None and a.fixed.kind == "input")


def input_names(trace: Trace) -> dict[str, str]:
    """Return {placeholder of the graph: the input as the forward calls it}."""
    holes = iter([n.name for n in trace.graph.nodes if n.op == "placeholder"])
    return {h: i.name for i in trace.signature.inputs for h in islice(holes, sum(i.is_tensor))}
