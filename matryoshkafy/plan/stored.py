"""decided(): what follows from a solved plan and its graph, written into the plan once.

Which weights are masked at which node, and what a sub-model stores of every tensor: the later
stages read these and derive nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import TensorInfo, info_of, output_node, reached
from matryoshkafy.graph.paths import checks_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.held import is_reparametrised
from matryoshkafy.plan.numbers import number_held, number_in
from matryoshkafy.plan.plan import Mask, Masks, Plan, Scalar, Stored
from matryoshkafy.rules.weights import weight_places


def decided(trace: Trace, plan: Plan) -> Plan:
    """Return the plan with the masks of its nodes and what its sub-models store."""
    masking = {name for name, act in plan.actions.items() if plan.masked and act.kind == "mask"}
    masked = [n for n in trace.graph.nodes if n.name in masking]
    plan = replace(plan, masks={n.name: _masks(n, plan) for n in masked})
    return replace(plan, stored=dict(_stored(trace, plan)))


def baked_name(node: str) -> str:
    """Return the name under which a sub-model keeps a full-width statistic of its parameters."""
    return f"baked_{node}"


def _masks(node: fx.Node, plan: Plan) -> dict[str, Masks]:
    """Which weights of a masked contraction are zero where, over which of their dims."""
    found: dict[str, Masks] = {}
    for weight, place in weight_places(node).items():
        shape = plan.dims(weight.name)
        into = [i for i in place.into if dims.is_nested(shape[i])]
        # What is whole going out is there at every size, and limits nothing; a weight with no dim
        # that nests going out is a table.
        outs = [o for o in place.outs if dims.is_nested(shape[o])]
        if into and outs:
            found[weight.name] = tuple(Mask(o, i) for i in into for o in outs)
    return found


def _stored(trace: Trace, plan: Plan) -> Iterator[tuple[str, Stored]]:
    """What the graphs of sub-models read; a second name of a tensor that is read is kept, too."""
    read = _read_by_sub_models(trace.graph, plan)
    state, masks = trace.state(), _stored_masks(trace, plan)
    objects = {id(state[str(n.target)]) for n in read if str(n.target) in state}
    names = {str(n.target) for n in read}
    numbers = _numbers(trace, plan)
    for name, shape in plan.parameters.items():
        if name in names or (name in state and id(state[name]) in objects):
            number = numbers.get(id(state[name])) if name in state else None
            yield name, Stored(shape, masks.get(name), scalar=number)
    for node in read:
        if node.op == "call_function":
            yield baked_name(node.name), Stored(plan.dims(node.name), source=node.name)


def _read_by_sub_models(graph: fx.Graph, plan: Plan) -> list[fx.Node]:
    """Tensors of the model, and statistics that are taken before the cut, behind the outputs and
    what a recorded path checks.
    """

    def is_read(node: fx.Node) -> bool:
        statistic = node.name in plan.full and not is_reparametrised(node)
        return statistic or node.op == "get_attr"

    # What a statistic is made of is not read behind it: it is stored in its place.
    ends = [output_node(graph), *checks_of(graph)]
    behind = reached(ends, lambda n: () if is_read(n) else n.all_input_nodes)
    return [n for n in graph.nodes if n in behind and is_read(n)]


def _stored_masks(trace: Trace, plan: Plan) -> dict[str, Mask]:
    """Return the weights that can be stored with their zeros written out.

    Only where every reader of a tensor, under any of its names, masks it in the same way.
    """
    wanted: dict[str, set[Masks]] = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                # A reader without a mask gives (), and then differs from those that have one.
                masks = plan.masks.get(user.name, {}).get(node.name, ())
                wanted.setdefault(str(node.target), set()).add(masks)
    aliases = _second_names(trace)
    return {
        name: next(iter(masks))[0]
        for name, masks in wanted.items()
        if len(masks) == 1 and len(next(iter(masks))) == 1 and name not in aliases
    }


def _second_names(trace: Trace) -> set[str]:
    """A tied tensor under a second name may be read without a mask."""
    state = trace.state()
    owners: dict[int, set[str]] = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr" and str(node.target) in state:
            owners.setdefault(id(state[str(node.target)]), set()).add(str(node.target))
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _numbers(trace: Trace, plan: Plan) -> dict[int, Scalar]:
    """Return {id: formula} of the buffers that hold a number which only constants of a width read.

    The graphs of sub-models hold the constants themselves; in the buffer it is for whoever loads a
    sub-model's tensors into the user's class.
    """
    of_node = {s.node: s for s in plan.scalars if s.form == "power"}
    read: dict[int, list[Scalar | None]] = {}
    tensors = dict[int, torch.Tensor]()
    state = trace.state() if of_node else {}
    for node in trace.graph.find_nodes(op="get_attr"):
        tensor = number_held(node, state)
        if tensor is not None:
            tensors[id(tensor)] = tensor
            read.setdefault(id(tensor), []).extend(map(of_node.get, _readers(node)))
    found = ((key, _formula(tensors[key], scalars)) for key, scalars in read.items())
    return {key: formula for key, formula in found if formula is not None}


def _readers(node: fx.Node) -> Iterator[str]:
    """Yield what reads a number, or a number that is computed of it."""
    for user in node.users:
        info = info_of(user)
        if isinstance(info, TensorInfo) and math.prod(info.shape) == 1:
            yield from _readers(user)
        else:
            yield user.name


def _formula(tensor: torch.Tensor, scalars: Sequence[Scalar | None]) -> Scalar | None:
    """Return the formula of a number, whose powers the constants are; None where they are not."""
    known = [s for s in scalars if s is not None]
    if not known or len(known) < len(scalars):
        return None
    value, close = number_in(tensor)
    found = {
        replace(s, node="", argument="", value=value, power=s.power * q, source="")
        for s in known
        for q in (1, 2, -1, -2)
        if math.isclose(value, s.value**q, rel_tol=close)
    }
    return found.pop() if len(found) == 1 else None


def statistics(plan: Plan) -> Mapping[str, str]:
    """Return {stored name: node} of the statistics that are taken at full width."""
    return {name: kept.source for name, kept in plan.stored.items() if kept.source}
