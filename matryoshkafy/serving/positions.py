"""What a decoder makes of positions alone: embeddings by place, rotations, causal masks.

Such values do not depend on the tokens, only on how many there are. A decoder that takes tokens one
after the other computes them for the whole length and reads the rows of its window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from matryoshkafy.graph.nodes import is_tensor, outputs_of, reached, sources_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.rewrite.codegen import runnable
from matryoshkafy.rules import op_of
from matryoshkafy.serving.vectors import ServingError


@dataclass(frozen=True, eq=False)
class Positions:
    """The values that depend on the length alone, and how they are computed.

    Args:
        names: the nodes that others read.
        dims: {node: dims that are as long as the tokens}, of every node.
        rebuilt: nodes that are made of such values and of the type of another (a mask of 0 and -inf
            in the type of the queries): they are made again rather than remembered.
        module: token ids [1, T] -> the values of `names`.
    """

    names: frozenset[str]
    dims: Mapping[str, tuple[int, ...]]
    rebuilt: frozenset[str]
    module: fx.GraphModule

    def rows(self, length: int, start: int, like: Tensor) -> dict[str, Tensor]:
        """Return the values of positions start..length, each among `length` positions."""
        if not self.names:
            return {}
        values = self.module(like.new_zeros((1, length)))
        return {
            name: value.narrow(self.dims[name][0], start, length - start)
            for name, value in zip(sorted(self.names), values, strict=True)
        }


def positions_of(trace: Trace, ids: Tensor) -> Positions:
    """Return what depends on the length alone.

    Args:
        trace: a traced decoder with one input, token ids [1, T].
        ids: example ids, T >= 3.
    """
    found = _token_dims(trace, ids)
    alone = _of_length_alone(trace)
    names = frozenset(
        node.name
        for node in alone
        if is_tensor(node) and any(user not in alone for user in node.users)
    )
    for name in names:
        if not 1 <= len(found[name]) <= 2:
            raise ServingError(
                f"{name} depends on the length, but {len(found[name])} of its dims are as long as "
                "the tokens; expected a value by position, or a mask of queries and keys"
            )
    return Positions(names, found, _rebuilt(trace, alone), _graph_of(trace, names))


def _of_length_alone(trace: Trace) -> set[fx.Node]:
    """Return the nodes that depend on the length of the tokens and not on the tokens."""
    tokens: set[fx.Node] = set()
    length: set[fx.Node] = set()
    for node in trace.graph.nodes:
        sizes = op_of(node).measures
        if node.op == "placeholder" or not sizes and any(n in tokens for n in node.all_input_nodes):
            tokens.add(node)
        elif sizes or any(n in length for n in node.all_input_nodes):
            length.add(node)
    return length


def _rebuilt(trace: Trace, alone: set[fx.Node]) -> frozenset[str]:
    made: set[fx.Node] = set()
    for node in trace.graph.nodes:
        inputs = node.all_input_nodes
        # zeros_like(x), x.new_full(...): the type of a tensor, and nothing of its values.
        like = op_of(node).uniform and any(map(is_tensor, inputs))
        if like or (inputs and node not in alone and all(n in made or n in alone for n in inputs)):
            made.add(node)
    return frozenset(node.name for node in made if node.op == "call_function")


def _token_dims(trace: Trace, ids: Tensor) -> dict[str, tuple[int, ...]]:
    long, short = (_shapes(trace, part) for part in (ids, ids[:, :-1]))
    return {
        name: tuple(
            i for i, (a, b) in enumerate(zip(long[name], short[name], strict=True)) if a != b
        )
        for name in long
    }


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.root, graph=trace.graph)
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = tuple(value.shape)
        return value


def _shapes(trace: Trace, ids: Tensor) -> dict[str, tuple[int, ...]]:
    runner = _Shapes(trace)
    with torch.no_grad():
        runner.run(ids)
    return runner.found


def _graph_of(trace: Trace, names: frozenset[str]) -> fx.GraphModule:
    """Return the graph of the values, and of nothing else: it runs at every token."""
    needed = _what_makes(trace, names)
    graph = fx.Graph()
    written: dict[fx.Node, Any] = {}
    for node in trace.graph.nodes:
        if node in needed or node.op == "placeholder":
            written[node] = graph.node_copy(node, lambda n: written[n])
    by_name = {node.name: node for node in written}
    graph.output(tuple(written[by_name[name]] for name in sorted(names)))
    return runnable(trace.root, graph)


def _what_makes(trace: Trace, names: frozenset[str]) -> set[fx.Node]:
    """Return nodes by name with all that they are computed from.

    Dead code alone does not leave them out: an op with an effect (a check of a shape) would keep
    all that it reads, which is the model.
    """
    return reached((node for node in trace.graph.nodes if node.name in names), sources_of)


def check_one_input(trace: Trace) -> None:
    """Raise `ServingError` where a model takes anything beside its tokens."""
    inputs = [n.name for n in trace.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise ServingError(
            f"a decoder of the inputs {inputs} was given; expected token ids alone. Convert it "
            "with the ids as its only example input: masks and positions are then its own"
        )
    if not any(isinstance(v, fx.Node) for v in outputs_of(trace.graph)):
        raise ServingError("the model returns no tensor; expected logits by position")
