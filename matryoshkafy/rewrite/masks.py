"""Which weights of a masked contraction are zero where, and over which of their dims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Action, Plan
from matryoshkafy.rules.weights import weight_places


@dataclass(frozen=True)
class Mask:
    """A weight is zero where the level of its output dim is below that of its input dim."""

    out: int
    into: int


def node_masks(node: fx.Node, plan: Plan) -> dict[fx.Node, tuple[Mask, ...]]:
    """Return which weights of a masked contraction are masked, over which of their dims."""
    found = {}
    for weight, place in weight_places(node).items():
        shape = plan.nodes[weight.name]
        into = [i for i in place.into if dims.is_nested(shape[i])]
        nested_out = any(dims.is_nested(shape[o]) for o in place.outs)
        masks = tuple(Mask(o, i) for i in into for o in place.outs)
        if masks and nested_out:  # a table that a weight meets is no weight
            found[weight] = masks
    return found


def masked_weights(node: fx.Node, plan: Plan) -> list[fx.Node]:
    return list(node_masks(node, plan))


def weight_masks(trace: Trace, plan: Plan) -> dict[fx.Node, Mask]:
    """Return the parameters that a sub-model can store with their zeros written out.

    Only where every reader of the parameter masks it in the same way.
    """
    wanted: dict[fx.Node, set[Any]] = {}
    for node in trace.graph.nodes:
        if plan.masked and plan.actions.get(node.name, Action("")).kind == "mask":
            for weight, masks in node_masks(node, plan).items():
                wanted.setdefault(weight, set()).add(masks if len(masks) == 1 else None)
    by_target: dict[str, set[Any]] = {}
    for weight, masks in wanted.items():
        readers = {n for n in weight.users if plan.actions.get(n.name, Action("")).kind == "mask"}
        whole = weight.op == "get_attr" and readers == set(weight.users)
        by_target.setdefault(str(weight.target), set()).update(masks if whole else {None})
    out = {}
    for weight in wanted:
        masks = by_target[str(weight.target)]
        if len(masks) == 1 and None not in masks:
            out[weight] = next(iter(masks))[0]
    return _without_aliased(trace, out)


def _without_aliased(trace: Trace, masks: dict[fx.Node, Mask]) -> dict[fx.Node, Mask]:
    """A tied tensor under a second name may be read without a mask."""
    state = trace.state()
    owners: dict[int, set[str]] = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr" and str(node.target) in state:
            owners.setdefault(id(state[str(node.target)]), set()).add(str(node.target))
    return {
        n: m for n, m in masks.items() if len(owners.get(id(state.get(str(n.target))), ())) <= 1
    }
