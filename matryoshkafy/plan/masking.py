"""choose(): what masked nesting does at each node, so that one full pass holds every size.

mask      a contraction with a parameter: outputs of a level read inputs of levels up to it
norm      a norm over a nested axis: statistics of each unit's own level (or prefix)
level     another statistic over a nested axis, kept at full length, one value per level
readout   a contraction into a whole axis that ends in outputs: the tail, once per size
inner     a contraction into a whole axis inside the trunk, and what follows: once per size, until
blocks    it meets a width again: the units of each level meet what that level has
clamp     where it meets none in that way: reads the smallest size only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Reason
from matryoshkafy.graph.nodes import bound_args, gives_several, is_tensor, op_key, output_node
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.held import free, nests, weights_of
from matryoshkafy.plan.regions import region
from matryoshkafy.plan.walk import Findings
from matryoshkafy.rules import Terms, op_of
from matryoshkafy.rules.table import reduced_dims
from matryoshkafy.rules.weights import weight_places

# How much of the graph may be computed once per size: with layers in it, and without any.
TAIL_SHARE = 0.1
LIGHT_SHARE = 0.3
PER_SIZE = ("inner", "blocks")
# An axis with more of the parameters than this shrinks at any price: whole, no size would be small.
CLAMP_SHARE = 0.2


@dataclass(frozen=True)
class Choice:
    """What masked nesting does at a node, and the axes that are summed there."""

    kind: str
    axes: tuple[Axis, ...] = ()


@dataclass(frozen=True)
class Masking:
    """Choices per node, the nodes computed once per size, and remarks for the plan."""

    choices: dict[str, Choice]
    tail: frozenset[str]
    remarks: tuple[str, ...]


def choose(
    trace: Trace, found: Findings, settle: Callable[[], None], share: Mapping[Axis, float]
) -> Masking:
    """Decide what every node does; axes that must be demoted are fixed on the way.

    `share` gives the part of all parameters that each axis belongs to.

    Each round that demotes an axis starts over, with one axis less: it ends.
    """
    planner = _Planner(trace, found, share)
    while not planner.round():
        settle()
    tail = frozenset(n.name for n in planner.tail)
    return Masking(planner.choices, tail, tuple(planner.remarks))


class _Planner:
    def __init__(self, trace: Trace, found: Findings, share: Mapping[Axis, float]) -> None:
        self.found, self.share = found, share
        self.nodes = [n for n in trace.graph.nodes if n.op == "call_function" and n in found.terms]
        self.work: list[fx.Node] = []
        self.output = output_node(trace.graph)
        self.remarks: list[str] = []
        self.choices: dict[str, Choice] = {}
        self.tail: set[fx.Node] = set()

    def round(self) -> bool:
        """Decide every node once; False when an axis was demoted and all must be decided again."""
        self.choices, self.tail = {}, set()
        # A weight that is made of parameters is masked where an activation meets it, not before.
        weights = weights_of(self.found)
        self.work = [n for n in self.nodes if n not in weights]
        self.count = sum(map(_is_tensor, self.work))
        self.readers = _descendants(self.work)
        closings: list[fx.Node] = []
        for node in self.work:
            kind = self._local(node)
            if kind == "closing":
                closings.append(node)
            elif kind:
                self.choices[node.name] = Choice(kind, self._summed(node))
        # Tails first, the shortest before: what they take is then known to those that reenter.
        closings.sort(key=lambda n: (self._reenters(n), self.readers[n].bit_count()))
        if not all(map(self._close, closings)):
            return False
        self._widen_all()
        return True

    def _after(self, node: fx.Node) -> set[fx.Node]:
        """Return what reads a node, directly or not."""
        bits = self.readers[node]
        return {n for i, n in enumerate(self.work) if bits >> i & 1}

    def _local(self, node: fx.Node) -> str | None:
        summed = [t for t in self.found.contracted.get(node, ()) if nests(t)]
        mixed = [t for t in self.found.mixed.get(node, ()) if nests(t)]
        if not summed and not mixed:
            return None
        if mixed and op_of(node).statistic == "normalise" and _over_one_axis(node):
            return "norm"
        # A statistic per level needs its dim to stay, and readers that bring the axis back.
        if mixed and self._keeps_dim(node) and widened(node, self.found) is not None:
            # A norm near the end makes vectors of length 1: in the tail, that of every size is one.
            small = self.readers[node].bit_count() <= TAIL_SHARE * self.count
            return "closing" if small and op_of(node).statistic == "norm" else "level"
        if summed and not mixed and op_of(node).weights and self._fans_out(node):
            return "mask"
        return "closing"

    def _summed(self, node: fx.Node) -> tuple[Axis, ...]:
        terms = (*self.found.contracted.get(node, ()), *self.found.mixed.get(node, ()))
        return tuple(dict.fromkeys(free(*terms)))

    def _widen_all(self) -> None:
        """A statistic kept at full length makes what is computed from it as long as the axis."""
        for node in self.work:
            choice = self.choices.get(node.name)
            if choice is not None and choice.kind == "level":
                for other, terms in (widened(node, self.found) or {}).items():
                    self.found.terms[other] = (terms,)

    def _keeps_dim(self, node: fx.Node) -> bool:
        if op_of(node).statistic in ("", "normalise") or gives_several(node):
            return False
        # The statistics that `level_reduce` takes: order 2, correction 0 or 1, the type as it is.
        args = bound_args(node)
        if args.get("ord", args.get("p", 2)) not in (2, None) or args.get("dtype") is not None:
            return False
        if args.get("correction", 1) not in (0, 1, None):
            return False
        return bool(args.get("keepdim")) and isinstance(args.get("dim"), (int, list, tuple))

    def _fans_out(self, node: fx.Node) -> bool:
        """Every summed axis stands in a weight whose outputs nest, which therefore is masked."""
        masked: set[Axis] = set()
        for weight, place in weight_places(node).items():
            terms = self.found.flat(weight)
            if any(nests(terms[o]) for o in place.outs):
                masked.update(free(*(terms[i] for i in place.into)))
        return set(self._summed(node)) <= masked

    def _clampable(self, node: fx.Node, summed: tuple[Axis, ...]) -> bool:
        """It has to be known which dims are summed, where the same axis leaves as well."""
        leaving = set(axes.leaves(*self.found.flat(node)))
        told = reduced_dims(node) is not None or not leaving & set(summed)
        return op_of(node).clampable and told

    def _is_light(self, after: set[fx.Node]) -> bool:
        """A tail may be nested again where it is short, or where no layer stands in it."""
        layers = any(self._kind(n) in ("mask", "norm") for n in after)
        share = TAIL_SHARE if layers else LIGHT_SHARE
        return len(self.tail | after) <= share * self.count

    def _kind(self, node: fx.Node) -> str:
        choice = self.choices.get(node.name)
        return choice.kind if choice is not None else ""

    def _reenters(self, node: fx.Node) -> bool:
        """Tell whether what follows is nested again: the tail would be a model of its own."""
        return any(nests(t) for n in self._after(node) for t in self.found.flat(n))

    def _computed_per_size(self, node: fx.Node, place: str) -> bool:
        """Compute what follows once per size, until it meets a width again."""
        found = region(node, self.found, lambda n: self._kind(n) not in ("", *PER_SIZE))
        if found is None or found.inner & self.tail:
            return False
        for inner in found.inner:
            self.choices[inner.name] = Choice("inner", self._summed(inner))
        for meeting in found.meetings:
            self.choices[meeting.name] = Choice("blocks", self._summed(meeting))
        self.remarks.append(
            f"per size: {op_key(node)} at {place} turns a width into a whole axis inside the "
            "trunk; every size computes its own, as a head of its own would"
        )
        return True

    def _close(self, node: fx.Node) -> bool:
        """A width ends here in a whole axis: the tail, or once per size, or clamped, or demoted."""
        if self._kind(node) in PER_SIZE:
            return True
        after = self._after(node) | {node}
        summed = self._summed(node)
        place = node.meta.get("source") or node.name
        if not self._reenters(node) or self._is_light(after):
            self.choices[node.name] = Choice("readout", summed)
            self.tail |= after
            return True
        if self._computed_per_size(node, place):
            return True
        weighty = any(self.share.get(axis, 0.0) > CLAMP_SHARE for axis in summed)
        if weighty and self._clampable(node, summed):
            self.choices[node.name] = Choice("clamp", summed)
            self.remarks.append(
                f"clamp: {op_key(node)} at {place} turns a width into a whole axis inside the "
                "trunk; it reads the smallest size only, which costs capacity"
            )
            return True
        # Nothing holds every size in one pass here, so the axis stays whole and all starts over.
        for leaf in summed:
            leaf.fixed = Reason("demoted", place)
        self.remarks.append(
            f"demoted: {', '.join(a.name for a in summed)} stays whole: {op_key(node)} at {place} "
            "turns it into a whole axis inside the trunk"
        )
        return False


def widened(node: fx.Node, found: Findings) -> dict[fx.Node, Terms] | None:
    """Return the terms of a statistic kept at full length, and of what is computed from it.

    None where something other than an elementwise op reads it before it meets its axis again.
    """
    terms = dict(enumerate(found.of(node.all_input_nodes[0])))
    dim = bound_args(node)["dim"]
    dims = {d % len(terms) for d in ([dim] if isinstance(dim, int) else dim)}
    # Over two widths at once there would be a level for every pair of sizes.
    if sum(nests(terms[d]) for d in dims) != 1:
        return None
    axis = next(d for d in dims if nests(terms[d]))
    out = {node: tuple(terms[d] if d == axis else t for d, t in enumerate(found.of(node)))}
    queue = [node]
    while queue:
        for user in queue.pop().users:
            step = _widened_user(user, out, found)
            if step is None:
                return None
            if step and user not in out:
                out[user] = step
                queue.append(user)
    return out


def _widened_user(user: fx.Node, out: Mapping[fx.Node, Terms], found: Findings) -> Terms | None:
    """() where the user has the axis anyway; its new terms where it grows; None where it cannot."""
    if not op_of(user).elementwise:
        return None
    before = found.of(user)
    rank, grown = len(before), list(before)
    for argument in user.all_input_nodes:
        mine = out.get(argument, ())
        for i, term in enumerate(mine, rank - len(mine)):
            if term and not grown[i]:
                grown[i] = term
            elif term and [*axes.leaves(term)] != [*axes.leaves(grown[i])]:
                return None
    return () if tuple(grown) == before else tuple(grown)


def _over_one_axis(node: fx.Node) -> bool:
    a = bound_args(node)
    return a.get("num_groups", 1) == 1 and len(a.get("normalized_shape", [0])) == 1


def _is_tensor(node: fx.Node) -> bool:
    return is_tensor(node) or gives_several(node)


def _descendants(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Return what reads each node, directly or not, as bits by their places among the nodes."""
    place = {node: i for i, node in enumerate(nodes)}
    # Readers come later in a graph, so from the back every reader's own bits are there already.
    after: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        mine = 0
        for user in node.users:
            if user in place:
                mine |= after[user] | 1 << place[user]
        after[node] = mine
    return after
