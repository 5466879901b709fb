"""A graph run in parts that are computed again in the backward (Chen 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx
from torch.fx.graph_module import _forward_from_src  # pyright: ignore[reportPrivateUsage]
from torch.utils import checkpoint as checkpoints

from matryoshkafy.rewrite.codegen import CallCodeGen

Function = Callable[..., Any]
WINDOW = 0.25  # how far a cut may move, in parts, to where few values are alive


def compiled(graph: fx.Graph) -> Function:
    """Return the function that torch.fx generates for a graph; its first argument holds the
    state.
    """
    code = graph.python_code("self")
    return _forward_from_src(code.src, code.globals)


@dataclass(frozen=True)
class Stretch:
    """A stretch of a graph: its function over the values it reads, and the values that it gives."""

    function: Function
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]


def checkpointed(graph: fx.Graph, parts: int) -> Function:
    """Return a graph's function that keeps for the backward what passes between `parts` alone.

    Random numbers (dropout) are drawn again as they were.
    """
    found = [_part(graph, stretch) for stretch in _stretches(graph, parts)]
    holes = [node for node in graph.nodes if node.op == "placeholder"]
    (last,) = (node for node in graph.nodes if node.op == "output")
    codegen = graph._codegen  # pyright: ignore[reportPrivateUsage]

    def function(root: Any, *args: Any, **kwargs: Any) -> Any:
        called = codegen if isinstance(codegen, CallCodeGen) else None
        flat = args if called is None else called.signature.flatten(args, kwargs)
        env: dict[fx.Node, Any] = dict(zip(holes, flat, strict=True))
        for part in found:
            given = [env[node] for node in part.reads]
            values = _run(part.function, root, given)
            env.update(zip(part.gives, values, strict=True))

        def value(node: fx.Node) -> Any:  # a tensor of the model may be given as it is
            return env[node] if node in env else attrgetter(str(node.target))(root)

        out = fx.map_arg(last.args[0], value)
        return out if called is None or called.flat else called.signature.unflatten(out)

    return function


def _run(function: Function, root: Any, given: list[Any]) -> Any:
    if not torch.is_grad_enabled():
        return function(root, *given)
    again = cast("Function", checkpoints.checkpoint)  # pyright: ignore[reportUnknownMemberType]
    return again(function, root, *given, use_reentrant=False)


def _stretches(graph: fx.Graph, parts: int) -> list[list[fx.Node]]:
    """Return the computing nodes in order, cut near equal lengths where few values are alive."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    at = {node: i for i, node in enumerate(nodes)}
    ends = [max((at.get(u, len(nodes)) for u in n.users), default=i) for n, i in at.items()]
    # alive[i]: how many values cross a cut before node i, and would be kept for the backward.
    alive = [0] * (len(nodes) + 1)
    for start, end in enumerate(ends):
        for cut in range(start + 1, min(end, len(nodes) - 1) + 1):
            alive[cut] += 1
    length = len(nodes) / max(1, parts)
    cuts = [0]
    for number in range(1, parts):
        near = range(
            max(cuts[-1] + 1, round(length * (number - WINDOW))),
            min(len(nodes), round(length * (number + WINDOW)) + 1),
        )
        if near:
            cuts.append(min(near, key=lambda i: alive[i]))
    cuts.append(len(nodes))
    return [nodes[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def _part(graph: fx.Graph, stretch: list[fx.Node]) -> Stretch:
    inside = set(stretch)
    read = dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside)
    gives = tuple(n for n in stretch if any(user not in inside for user in n.users))
    reads = tuple(n for n in read if n.op != "get_attr")
    made, memo = fx.Graph(owning_module=graph.owning_module), dict[fx.Node, fx.Node]()
    for node in reads:
        memo[node] = made.placeholder(node.name)
    for node in [*(n for n in read if n.op == "get_attr"), *stretch]:
        memo[node] = made.node_copy(node, lambda n: memo[n])
    made.output([memo[n] for n in gives])
    return Stretch(compiled(made), reads, gives)
