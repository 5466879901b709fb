"""Which change of basis an axis allows: one walk over the values that carry it.

A group may be rotated where every op on its axis commutes with an orthogonal matrix Q: sums,
products with weights (whose side is rotated), norms. A gain behind a norm stands in the way until
it is folded into the weights that read it; a mean over the axis asks for a Q that keeps the
direction of ones. What is not in the vocabulary below is an obstacle, with its place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import (
    gives_several,
    is_item,
    is_tensor,
    op_key,
    outputs_of,
    source_of,
)
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rules import op_of
from matryoshkafy.units.commuting import RULES, carried, norm, product, readers_of
from matryoshkafy.units.normed import NORMS
from matryoshkafy.units.states import Gained, State, Stream, Survey, Uniform, Weight

STEEP = 1e3  # a bias over its gain that float32 still adds to a normalised unit
# Through these a weight is read as it stands, or a part of it.
FOLLOWED = ("turn", "same", "like", "spread", "carry")


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
            if not isinstance(state, Stream | Weight):
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
        self.states[node] = Weight(str(node.target))

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
        if row.algebra == "zero":
            return Stream()  # in any basis
        if row.algebra == "uniform" or (not known and row.algebra in ("spread", "same", "like")):
            return Uniform()
        if not is_tensor(node) and not gives_several(node):
            return None
        if row.weights and not gives_several(node):
            return product(self, node, known, places)
        if row.nested in NORMS:
            return norm(self, node, known, places)
        handler = carried if is_item(node) else RULES.get(row.algebra)
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

    def reader(self, node: fx.Node, weight: fx.Node, gained: Gained) -> str | None:
        """Note that a weight reads a gained stream; return the obstacle where it cannot fold it."""
        while _passes(weight):
            weight = weight.all_input_nodes[0]
        mine = self.places(weight) or []
        if weight.op != "get_attr" or len(mine) != 1:
            return f"a weight that is computed reads it behind the gain {gained.gain}"
        self.found.readers.setdefault(gained.gain, set()).add((str(weight.target), mine[0]))
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


def _passes(node: fx.Node) -> bool:
    """Tell whether a node gives what it reads as it stands, or a part of it."""
    row, plain = op_of(node), bool(node.args) and isinstance(node.args[0], fx.Node)
    return is_item(node) or (plain and row.algebra in FOLLOWED and (row.picks or not row.lookup))


def _uses(node: fx.Node, walk: _Walk) -> int:
    """Count the uses of a weight other than reading a gained stream."""
    count = 0
    for user in readers_of(node):
        if _passes(user) and user.all_input_nodes[0] is node:
            count += _uses(user, walk)
        elif not any(isinstance(walk.states.get(n), Gained) for n in user.all_input_nodes):
            count += 1
    return count


def survey(
    graph: fx.Graph, plan: Plan, state: Mapping[str, Tensor], group: int, *, post: bool = False
) -> Survey:
    """Return what keeps a group from rotating, what is folded before; `post`: gains may stay."""
    with torch.no_grad():
        return _Walk(graph, plan, state, group, post=post).survey()
