"""Which ops commute with a change of basis: by the word of an op's row, what its value is then.

A handler returns the state of the value, None where the axis ends, or an obstacle's text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from matryoshkafy.graph.nodes import bound_args, gives_several, is_item, is_tensor, op_key
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import weight_places
from matryoshkafy.units.states import (
    Gained,
    Squared,
    State,
    Stream,
    Survey,
    Uniform,
    Weight,
    Written,
)


class Walk(Protocol):
    """What a handler asks of the walk."""

    found: Survey
    tensors: Mapping[str, Tensor]
    states: dict[fx.Node, State]

    def places(self, node: fx.Node) -> list[int] | None:
        """Return the dims that are the group's axis; None where the axis is part of a dim."""
        ...

    def gained(self, gain: str | None, offset: float = 0.0, bias: str = "") -> State:
        """Return what a stream becomes behind a gain; a gain of ones changes nothing."""
        ...

    def reader(self, node: fx.Node, weight: fx.Node, gained: Gained) -> str | None:
        """Note that a weight reads a gained stream; return the obstacle where it cannot fold it."""
        ...


Known = dict[fx.Node, State]


# Arguments that say where; they must be the same at every unit.
SELECTORS = ("index", "indices", "mask", "condition", "repeats")
# Arguments that may be written as a number.
NUMBERS = ("value", "self", "other", "src")


def carried(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """The op acts on other dims: what comes in goes out."""
    several = gives_several(node)
    selectors = _selectors(node)
    if any(not isinstance(known.get(n, Uniform()), Uniform) for n in selectors):
        return f"{op_key(node)} picks among its units"
    values = {n: s for n, s in known.items() if n not in selectors}
    states = set(map(_plain, values.values()))
    if not places and not several:
        return _summed(walk, node, states)
    (only,) = values.values() if len(values) == 1 else (None,)
    if only is not None and (op_of(node).algebra == "same" or isinstance(only, Written)):
        return only
    if len(states) != 1:
        return f"{op_key(node)} joins values in different bases"
    return next(iter(states))


def _plain(state: State) -> State:
    """Return what a value is where several meet: a weight, or what a product wrote, is a stream."""
    stream = isinstance(state, Written) or (isinstance(state, Weight) and not state.offset)
    return Stream() if stream else state


def _first(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """The first value goes out, in the shape or the type of another."""
    state = known.get(node.args[0])  # type: ignore[arg-type]
    if state is None:
        return Uniform() if places else None
    if op_of(node).algebra == "like":
        return state
    return carried(walk, node, {n: s for n, s in known.items() if n is node.args[0]}, places)


def _selectors(node: fx.Node) -> set[fx.Node]:
    named = {} if is_item(node) else bound_args(node)
    given = [named[name] for name in SELECTORS if name in named]
    return {n for n in pytree.tree_leaves(given) if isinstance(n, fx.Node)}


def _written(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """Values, or zeros, are written at places along other dims."""
    args, selectors = bound_args(node), _selectors(node)
    numbers = [n for name in NUMBERS if isinstance(n := args.get(name), int | float)]
    if any(numbers) or args.get("reduce"):
        return f"{op_key(node)} writes the same number at every unit"
    others = (n for n in node.all_input_nodes if n not in known and n not in selectors)
    if any(map(is_tensor, others)):
        return f"{op_key(node)} writes a value of another axis"
    return carried(walk, node, known, places)


def _summed(walk: Walk, node: fx.Node, states: set[State]) -> str | None:
    """The axis ends here: sums of squares stay, a mean asks for the direction of ones."""
    if op_of(node).statistic not in ("sum", "mean") or len(states) != 1:
        return f"{op_key(node)} picks among its units"
    (state,) = states
    if isinstance(state, Stream):
        walk.found.mean = True
    return None if isinstance(state, Stream | Squared | Uniform) else "a gained stream is summed"


def _added(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """Streams add; one number for all units asks for the direction of ones."""
    values = list(known.values())
    if any(isinstance(s, Gained) for s in values):
        return "the gain of a norm stands on the stream itself (post-norm)"
    if any(isinstance(s, Squared | Uniform) for s in values):
        return f"{op_key(node)} adds to squares"
    other = [a for a in node.args[:2] if a not in known]
    if len(values) == 1 and isinstance(values[0], Weight) and other:
        if isinstance(other[0], int | float):
            return Weight(values[0].name, values[0].offset + float(other[0]))
        return "a number is added to a weight"
    walk.found.mean = walk.found.mean or bool(other)
    return Stream()


def _multiplied(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """A stream times a number, a gain, or itself."""
    states = [s for s in known.values() if not isinstance(s, Uniform)]
    if len(node.args) > 1 and node.args[0] is node.args[1] and len(states) == 1:
        return Squared() if isinstance(states[0], Stream) else "a square of a gained stream"
    weights = [s for s in states if isinstance(s, Weight)]
    streams = [s for s in states if not isinstance(s, Weight)]
    if len(states) <= 1:
        return states[0] if states else Uniform()
    if len(weights) == 1 and len(streams) == 1 and isinstance(streams[0], Stream):
        if walk.tensors[weights[0].name].dim() != 1:
            return "a table multiplies it"
        if isinstance(streams[0], Written) and _alone(walk, node, streams[0]):
            _fold_before(walk, weights[0], streams[0])
            return Stream()
        return walk.gained(weights[0].name, weights[0].offset)
    return "two values are multiplied unit by unit"


def _alone(walk: Walk, node: fx.Node, written: Written) -> bool:
    """Tell whether nothing but this op reads what a product wrote."""
    while node is not written.product:
        node = next(n for n in node.all_input_nodes if walk.states.get(n) is written)
        if len(node.users) != 1:
            return False
    return True


def _fold_before(walk: Walk, gain: Weight, written: Written) -> None:
    """A gain behind a product (LayerScale, Touvron et al. 2021) is one of its weight and bias."""
    walk.found.scales.add(gain.name)
    walk.found.written.setdefault(gain.name, (gain.offset, set()))[1].add(written)


def _attended(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """softmax(q k') v: q meets k over the axis, or positions of v are mixed along it."""
    args = bound_args(node)
    query, key, value = (known.get(args[name]) for name in ("query", "key", "value"))
    given = [state for state in (query, key, value) if state is not None]
    if len(given) != len(known) or any(_plain(state) != Stream() for state in given):
        return "attention reads a gained stream"
    if (query is None) != (key is None):
        return "queries and keys are in different bases"
    walk.found.contracted = walk.found.contracted or query is not None
    return None if value is None else Stream()


def _divided(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """A stream by a number."""
    numerator, denominator = (known.get(a) for a in node.args[:2])  # type: ignore[arg-type]
    if denominator is not None and not isinstance(denominator, Uniform):
        return "it divides unit by unit"
    return numerator


def _power(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """Squares."""
    (state,) = known.values()
    square = len(node.args) == 1 or node.args[1] == 2
    if isinstance(state, Gained):
        return "a norm reads a gained stream"
    return Squared() if square and isinstance(state, Stream) else "a power of its units"


def norm(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
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


def _length(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """The Euclidean length over the axis alone."""
    args = bound_args(node)
    (state,) = known.values()
    plain = (
        isinstance(_plain(state), Stream) and args.get("ord", args.get("p", 2)) == 2 and not places
    )
    return None if plain else "a norm that is not the length of the stream"


def product(walk: Walk, node: fx.Node, known: Known, places: list[int]) -> State | str | None:
    """A contraction: over the axis on both sides, or over another dim."""
    weights = {w: p for w, p in weight_places(node).items() if w in known}
    into = [w for w, p in weights.items() if any(d in _own(walk, w) for d in p.into)]
    outs = [w for w, p in weights.items() if any(d in _own(walk, w) for d in p.outs)]
    args = bound_args(node)
    reads = op_of(node).reads
    # addmm adds `self` to the product; matmul reads it.
    bias = args.get("bias", args.get("self") if reads and reads[0] != "self" else None)
    values = {n: s for n, s in known.items() if n not in weights and n is not bias}
    if any(not isinstance(s, Stream | Weight | Gained) for s in values.values()):
        return "squares are multiplied by a weight"
    if into:
        walk.found.contracted = True
        gained = (s for s in values.values() if isinstance(s, Gained))
        refused = next(filter(None, (walk.reader(node, into[0], s) for s in gained)), None)
        return refused or (Stream() if places else None)
    if outs and values:
        return "a weight acts on each of its units (depthwise)"
    if outs:
        return _wrote(walk, node, outs[0], bias)
    return _met(walk, values, places)


def _wrote(walk: Walk, node: fx.Node, weight: fx.Node, bias: object) -> Stream:
    """Return the stream that a weight writes; a gain may be folded into one that is used once."""
    tensors = [n for n in (weight, bias) if isinstance(n, fx.Node)]
    plain = all(n.op == "get_attr" and len(readers_of(n)) == 1 for n in tensors)
    dims = _own(walk, weight)
    if not plain or len(dims) != 1:
        return Stream()
    named = str(bias.target) if isinstance(bias, fx.Node) else ""
    return Written(node, str(weight.target), dims[0], named)


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return who reads the numbers of a tensor, not its type or its device."""
    return [user for user in node.users if user.target is not getattr]


def _own(walk: Walk, node: fx.Node) -> list[int]:
    return walk.places(node) or []


def _met(walk: Walk, values: Known, places: list[int]) -> State | str | None:
    """No weight carries the axis: it is kept by a product over positions, or summed on both
    sides.
    """
    states = {Stream() if isinstance(s, Weight) else _plain(s) for s in values.values()}
    if len(values) == 1 and places:
        return next(iter(states))
    if len(values) in (1, 2) and not places and states == {Stream()}:
        walk.found.contracted = True
        return None
    return "two values are multiplied behind a gain"


Handler = Callable[[Walk, fx.Node, Known, list[int]], State | str | None]
# By the word of the op's row.
RULES: Mapping[str, Handler] = {
    **dict.fromkeys(("carry", "same", "turn"), carried),
    **dict.fromkeys(("spread", "like"), _first),
    "write": _written,
    **dict.fromkeys(("add", "subtract"), _added),
    "attend": _attended,
    "multiply": _multiplied,
    "divide": _divided,
    "power": _power,
    "length": _length,
}
