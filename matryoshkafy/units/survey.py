"""Which change of basis an axis allows: one walk over the values that carry it.

A group may be rotated where every op on its axis commutes with an orthogonal matrix Q: sums,
products with weights (whose side is rotated), norms. A gain behind a norm stands in the way until
it is folded into the weights that read it; a mean over the axis asks for a Q that keeps the
direction of ones. What is not in the vocabulary below is an obstacle, with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import (
    bound_args,
    gives_several,
    is_item,
    is_tensor,
    op_key,
    outputs_of,
    source_of,
)
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import weight_places
from matryoshkafy.units.normed import NORMS


@dataclass(frozen=True)
class Stream:
    """A value in the group's basis; rotating the group rotates it."""


@dataclass(frozen=True)
class _Weight:
    """A parameter in the group's basis, or `offset` + one: a gain, where it multiplies a stream."""

    name: str
    offset: float = 0.0


@dataclass(frozen=True)
class Gained:
    """A stream whose units were multiplied by a gain: only weights may read it."""

    gain: str
    offset: float
    bias: str = ""


@dataclass(frozen=True)
class Squared:
    """The squares of a stream, to be summed over the axis."""


@dataclass(frozen=True)
class Uniform:
    """The same number at every unit."""


STEEP = 1e3  # a bias over its gain that float32 still adds to a normalised unit
State = Stream | _Weight | Gained | Squared | Uniform
Reader = tuple[str, int]


@dataclass
class Survey:
    """What the walk found for one group.

    `obstacles`: why it cannot be rotated. `gains`: those to be folded into `readers` {gain:
    {(weight, dim)}}; `scales`: every gain, those of ones too, none of which is turned. `diagonal`
    those that stay on the stream, of a post-norm survey. `mean`: the direction of ones must stay.
    `contracted`: some weight reads it.
    """

    group: int
    obstacles: list[str] = field(default_factory=list[str])
    gains: dict[str, Gained] = field(default_factory=dict[str, Gained])
    readers: dict[str, set[Reader]] = field(default_factory=dict[str, set[Reader]])
    scales: set[str] = field(default_factory=set[str])
    diagonal: dict[str, Gained] = field(default_factory=dict[str, Gained])
    mean: bool = False
    contracted: bool = False


class _Walk:
    """States of the values that carry one group, node by node."""

    def __init__(
        self,
        graph: fx.Graph,
        plan: Plan,
        state: Mapping[str, Tensor],
        group: int,
        *,
        post: bool = False,
    ) -> None:
        self.post = post
        self.graph, self.plan, self.tensors = graph, plan, state
        self.group, self.found = group, Survey(group)
        self.states: dict[fx.Node, State] = {}

    def survey(self) -> Survey:
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._begin(node)
            elif node.op == "call_function":
                self._visit(node)
        for value in (v for v in outputs_of(self.graph) if isinstance(v, fx.Node)):
            state = self.states.get(value, Stream())
            if not isinstance(state, Stream | _Weight):
                gained = isinstance(state, Gained)
                what = "the gain of the last norm stands" if gained else "squares of it stand"
                self.obstacle(value, f"{what} at the output")
        self._check_gains()
        return self.found

    # Places.

    def places(self, node: fx.Node) -> list[int] | None:
        """Return the dims that are the group's axis; None where the axis is part of a dim."""
        shape = () if gives_several(node) else self.plan.dims(node.name)
        mine = [i for i, d in enumerate(shape) if self.group in dims.groups_of(d)]
        plain = all(len(shape[i]) == 1 and isinstance(shape[i][0], dims.Nested) for i in mine)
        return mine if plain else None

    def obstacle(self, node: fx.Node, why: str) -> None:
        place = source_of(node) or node.name
        self.found.obstacles.append(f"{why}, at {place}")

    def _begin(self, node: fx.Node) -> None:
        places = self.places(node)
        if places == []:
            return
        if places is None:
            self.obstacle(node, f"{node.target} holds it as a part of a larger dim")
        elif node.op == "placeholder":
            self.obstacle(node, "it comes in with an input")
        self.states[node] = _Weight(str(node.target))

    def _visit(self, node: fx.Node) -> None:
        places = self.places(node)
        known = {n: self.states[n] for n in node.all_input_nodes if n in self.states}
        if not known and places == []:
            return
        if places is None:
            self.obstacle(node, f"{op_key(node)} makes it a part of a larger dim")
            return
        result = self._result(node, known, places)
        if isinstance(result, str):
            self.obstacle(node, result)
            result = Stream()
        if result is not None and (places or gives_several(node)):
            self.states[node] = result

    def _result(
        self, node: fx.Node, known: dict[fx.Node, State], places: list[int]
    ) -> State | str | None:
        """Return the state of a node's value, None without the axis, or an obstacle's text."""
        row = op_of(node)
        if row.algebra == "uniform" or (not known and row.algebra in ("spread", "same")):
            return Uniform()
        if not is_tensor(node) and not gives_several(node):
            return None
        if row.weights and not gives_several(node):
            return _product(self, node, known, places)
        if row.nested in NORMS:
            return _norm(self, node, known, places)
        handler = _carried if is_item(node) else RULES.get(row.algebra)
        if handler is None:
            return f"{op_key(node)} acts on each of its units"
        return handler(self, node, known, places)

    # Gains.

    def gained(self, gain: str | None, offset: float = 0.0, bias: str = "") -> State:
        """Return what a stream becomes behind a gain; a gain of ones changes nothing."""
        if gain is None:
            return Stream()
        self.found.scales.add(gain)
        if self.post:
            self.found.diagonal[gain] = Gained(gain, offset, bias)
            return Stream()
        tensor = self.tensors[gain].detach() + offset
        if bool((tensor == 1).all()):
            return Stream()
        found = Gained(gain, offset, bias)
        self.found.gains[gain] = found
        steep = (self.tensors[bias].detach() / tensor).nan_to_num(0.0).abs() if bias else tensor[:0]
        if bool((steep > STEEP).any()):
            self.found.obstacles.append(
                f"the gain {gain} has a unit near zero beside its bias, so it cannot be folded"
            )
        return found

    def reader(self, node: fx.Node, weight: fx.Node, dim: int, gained: Gained) -> str | None:
        """Note that a weight reads a gained stream; return the obstacle where it cannot fold it."""
        while op_of(weight).algebra == "turn":
            weight, dim = weight.all_input_nodes[0], 1 - dim
        if weight.op != "get_attr":
            return f"a weight that is computed reads it behind the gain {gained.gain}"
        self.found.readers.setdefault(gained.gain, set()).add((str(weight.target), dim))
        return None

    def _check_gains(self) -> None:
        """A weight that folds a gain must be read behind that gain only."""
        folded: dict[int, set[str]] = {}
        counts: dict[int, int] = {}
        for gain, readers in self.found.readers.items():
            for name, _ in readers:
                folded.setdefault(id(self.tensors[name]), set()).add(gain)
        for node in self.graph.nodes:
            if node.op == "get_attr" and str(node.target) in self.tensors:
                key = id(self.tensors[str(node.target)])
                counts[key] = counts.get(key, 0) + _uses(node, self)
        for gain, readers in self.found.readers.items():
            for name, _ in readers:
                key = id(self.tensors[name])
                if len(folded[key]) > 1 or counts.get(key, 0) > 0:
                    self.found.obstacles.append(
                        f"{name} reads it behind the gain {gain} and is used elsewhere too (tied): "
                        "mk.untie(model) before convert gives the head a weight of its own"
                    )


def _uses(node: fx.Node, walk: _Walk) -> int:
    """Count the uses of a weight other than reading a gained stream."""
    count = 0
    for user in node.users:
        if op_of(user).algebra == "turn":
            count += _uses(user, walk)
        elif not any(isinstance(walk.states.get(n), Gained) for n in user.all_input_nodes):
            count += 1
    return count


Known = dict[fx.Node, State]


def _carried(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """The op acts on other dims: what comes in goes out."""
    several = gives_several(node)
    states = {Stream() if isinstance(s, _Weight) and not s.offset else s for s in known.values()}
    if not places and not several:
        return _summed(walk, node, states)
    if op_of(node).algebra == "spread" and node.args[0] not in known:
        return Uniform()
    if len(known) == 1 and op_of(node).algebra == "same":
        return next(iter(known.values()))
    if len(states) != 1:
        return f"{op_key(node)} joins values in different bases"
    return next(iter(states))


def _summed(walk: _Walk, node: fx.Node, states: set[State]) -> str | None:
    """The axis ends here: sums of squares stay, a mean asks for the direction of ones."""
    if op_of(node).statistic not in ("sum", "mean") or len(states) != 1:
        return f"{op_key(node)} picks among its units"
    (state,) = states
    if isinstance(state, Stream):
        walk.found.mean = True
    return None if isinstance(state, Stream | Squared | Uniform) else "a gained stream is summed"


def _added(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """Streams add; one number for all units asks for the direction of ones."""
    values = list(known.values())
    if any(isinstance(s, Gained) for s in values):
        return "the gain of a norm stands on the stream itself (post-norm)"
    if any(isinstance(s, Squared | Uniform) for s in values):
        return f"{op_key(node)} adds to squares"
    other = [a for a in node.args[:2] if a not in known]
    if len(values) == 1 and isinstance(values[0], _Weight) and other:
        if isinstance(other[0], int | float):
            return _Weight(values[0].name, values[0].offset + float(other[0]))
        return "a number is added to a weight"
    walk.found.mean = walk.found.mean or bool(other)
    return Stream()


def _multiplied(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """A stream times a number, a gain, or itself."""
    states = [s for s in known.values() if not isinstance(s, Uniform)]
    if len(node.args) > 1 and node.args[0] is node.args[1] and len(states) == 1:
        return Squared() if isinstance(states[0], Stream) else "a square of a gained stream"
    weights = [s for s in states if isinstance(s, _Weight)]
    streams = [s for s in states if not isinstance(s, _Weight)]
    if len(states) <= 1:
        return states[0] if states else Uniform()
    if len(weights) == 1 and len(streams) == 1 and isinstance(streams[0], Stream):
        vector = walk.tensors[weights[0].name].dim() == 1
        return (
            walk.gained(weights[0].name, weights[0].offset) if vector else "a table multiplies it"
        )
    return "two values are multiplied unit by unit"


def _divided(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """A stream by a number."""
    numerator, denominator = (known.get(a) for a in node.args[:2])  # type: ignore[arg-type]
    if denominator is not None and not isinstance(denominator, Uniform):
        return "it divides unit by unit"
    return numerator


def _power(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """Squares."""
    (state,) = known.values()
    square = len(node.args) == 1 or node.args[1] == 2
    return Squared() if square and isinstance(state, Stream) else "a power of its units"


def _norm(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """LayerNorm and RMSNorm over the axis; their gain and bias follow."""
    args = bound_args(node)
    state = known.get(args["input"])
    if not isinstance(state, Stream) or len(args["normalized_shape"]) != 1:
        return "a norm reads a gained stream" if state is not None else "a norm of other dims"
    walk.found.mean = walk.found.mean or op_of(node).nested == "layer_norm"
    gain, bias = args.get("weight"), args.get("bias")
    named = [None if n is None else str(n.target) for n in (gain, bias)]
    if any(n is not None and n.op != "get_attr" for n in (gain, bias)):
        return "the gain of a norm is computed"
    return walk.gained(named[0], 0.0, named[1] or "")


def _length(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """The Euclidean length over the axis alone."""
    args = bound_args(node)
    (state,) = known.values()
    plain = isinstance(state, Stream) and args.get("ord", args.get("p", 2)) == 2 and not places
    return None if plain else "a norm that is not the length of the stream"


def _product(walk: _Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """A contraction: over the axis on both sides, or over another dim."""
    weights = {w: p for w, p in weight_places(node).items() if w in known}
    into = [(w, d) for w, p in weights.items() for d in p.into if d in _own(walk, w)]
    outs = [w for w, p in weights.items() if any(d in _own(walk, w) for d in p.outs)]
    args = bound_args(node)
    reads = op_of(node).reads
    # addmm adds `self` to the product; matmul reads it.
    bias = args.get("bias", args.get("self") if reads and reads[0] != "self" else None)
    values = {n: s for n, s in known.items() if n not in weights and n is not bias}
    if any(not isinstance(s, Stream | _Weight | Gained) for s in values.values()):
        return "squares are multiplied by a weight"
    if into:
        walk.found.contracted = True
        for state in values.values():
            refused = _reads(walk, node, into[0], state)
            if refused:
                return refused
        return Stream() if places else None
    if outs:
        return Stream() if not values else "a weight acts on each of its units (depthwise)"
    return _met(walk, values, places)


def _own(walk: _Walk, node: fx.Node) -> list[int]:
    return walk.places(node) or []


def _reads(walk: _Walk, node: fx.Node, weight: tuple[fx.Node, int], state: State) -> str | None:
    return walk.reader(node, *weight, state) if isinstance(state, Gained) else None


def _met(walk: _Walk, values: Known, places: list[int]) -> State | str | None:
    """No weight carries the axis: it is kept by a product over positions, or summed on both
    sides.
    """
    states = {Stream() if isinstance(s, _Weight) else s for s in values.values()}
    if len(values) == 1 and places:
        return next(iter(states))
    if len(values) in (1, 2) and not places and states == {Stream()}:
        walk.found.contracted = True
        return None
    return "two values are multiplied behind a gain"


Handler = Callable[[_Walk, fx.Node, Known, list[int]], State | str | None]
# By the word of the op's row.
RULES: Mapping[str, Handler] = {
    **dict.fromkeys(("carry", "same", "turn", "spread"), _carried),
    **dict.fromkeys(("add", "subtract"), _added),
    "multiply": _multiplied,
    "divide": _divided,
    "power": _power,
    "length": _length,
}


def survey(
    graph: fx.Graph, plan: Plan, state: Mapping[str, Tensor], group: int, *, post: bool = False
) -> Survey:
    """Return what keeps a group from rotating, what is folded before; `post`: gains may stay."""
    with torch.no_grad():
        return _Walk(graph, plan, state, group, post=post).survey()
