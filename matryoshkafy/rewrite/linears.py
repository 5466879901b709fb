"""The linears of a sub-model as `nn.Linear` modules, which adapters and quantizers look for."""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import fx, nn

LINEAR = torch.ops.aten.linear.default


def as_modules(root: nn.Module, graph: fx.Graph) -> None:
    """Write a linear whose weight is its own as a call of an `nn.Linear` under the user's name.

    A weight that is read elsewhere too (a tied head), is computed, or has neighbours in its module
    stays an operand: a module in its place would hide a part of the model from who replaces it.
    """
    _read_elsewhere(root, graph)
    for node in list(graph.nodes):
        place = _place(root, node)
        if place is None:
            continue
        parent, _, leaf = place.rpartition(".")
        setattr(root.get_submodule(parent), leaf, _linear(root.get_submodule(place)))
        operands = [operand for operand in node.args[1:] if isinstance(operand, fx.Node)]
        node.op, node.target, node.args = "call_module", place, node.args[:1]
        for operand in operands:
            graph.erase_node(operand)


def _read_elsewhere(root: nn.Module, graph: fx.Graph) -> None:
    """Take device and dtype off a tensor that no linear has: its weight would be read twice."""
    readers: dict[str, list[object]] = {}
    for node in graph.find_nodes(op="get_attr"):
        targets = [user.target for user in node.users if user.target is not getattr]
        readers.setdefault(str(node.target), []).extend(targets)
    mine = {name for name, targets in readers.items() if targets == [LINEAR]}
    # A graph reads the flag of training mode beside the tensors.
    others = [n for n in readers if n not in mine and isinstance(_held(root, n), torch.Tensor)]
    for read in graph.find_nodes(op="call_function", target=getattr):
        name = str(read.all_input_nodes[0].target)
        alike = (o for o in others if _held(root, o).dtype == _held(root, name).dtype)
        if name in mine and (other := next(alike, None)):
            with graph.inserting_before(read):
                read.args = (graph.create_node("get_attr", other), *read.args[1:])


def _held(root: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)


def as_functions(graph: fx.Graph, root: nn.Module) -> None:
    """Write what `as_modules` wrote as calls of functions again.

    Raises TypeError where a module is no `nn.Linear`: another library has put its own there.
    """
    for node in graph.find_nodes(op="call_module"):
        place = str(node.target)
        module = root.get_submodule(place)
        if type(module) is not nn.Linear:
            raise TypeError(place)
        with graph.inserting_before(node):
            bias = cast("nn.Parameter | None", module.bias)
            names = [f"{place}.weight"] + ([f"{place}.bias"] if bias is not None else [])
            operands = [graph.create_node("get_attr", name) for name in names]
        node.args = (*node.args, *operands)
        node.op, node.target = "call_function", LINEAR


def foreign(model: nn.Module) -> dict[str, str]:
    """Return {place: class} of modules in a sub-model that another library has put there."""
    own = (nn.Module, nn.Linear)
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    kinds = ((name, type(m)) for name, m in modules if name)
    return {name: kind.__name__ for name, kind in kinds if kind not in own}


def _place(root: nn.Module, node: fx.Node) -> str | None:
    """Return the module of a linear's weight and bias, None where they are not its alone."""
    if node.op != "call_function" or node.target is not LINEAR or node.kwargs:
        return None
    operands = [operand for operand in node.args[1:] if operand is not None]
    reads = [n for n in operands if isinstance(n, fx.Node) and n.op == "get_attr"]
    if reads != operands or any(len(read.users) != 1 for read in reads):
        return None
    names = [str(read.target) for read in reads]
    place = names[0].rpartition(".")[0]
    if not place or any(keyword.iskeyword(part) for part in place.split(".")):
        return None
    leaves = ["weight", "bias"][: len(names)]
    holder = root.get_submodule(place)
    others = [*holder.buffers(recurse=False), *holder.children()]
    # Whatever else the module holds would be lost with it, or call for a module of another kind.
    held = {name for name, _ in holder.named_parameters(recurse=False)} == {*leaves} and not others
    plain = type(holder) is nn.Module and held and names == [f"{place}.{leaf}" for leaf in leaves]
    return place if plain else None


def _linear(holder: nn.Module) -> nn.Linear:
    held = dict(holder.named_parameters(recurse=False))
    weight, bias = held["weight"], held.get("bias")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made
