"""Where a non-finite loss comes from: the doll runs once more and is read backwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.graph.copies import forked
from matryoshkafy.graph.nodes import op_key, output_node, reached
from matryoshkafy.rewrite.graphs import outputs_graph
from matryoshkafy.rules import op_of

REMEDY = "Lower the learning rate, clip the gradients, or use bfloat16 in place of float16."


class NonFiniteLoss(MatryoshkafyError):
    """A loss became infinite or nan; the message names the first module that made it so."""


@dataclass(frozen=True)
class Blame:
    """What made a non-finite value out of finite ones (or nan out of the infinities of a mask).

    Args:
        kind: "input", "parameter" or "op".
        name: the input's, the parameter's, or the op's.
        module: the one whose parameters the op reads, "after " the last such one for an op without
            any ("" if there is none).
        source: the user's line.
        size: that of the pass, if any.
        value: "nan" or "inf".
    """

    kind: str
    name: str
    module: str
    source: str
    size: int | None
    value: str

    def __str__(self) -> str:
        if self.kind != "op":
            return f"{self.kind} `{self.name}` holds {self.value}"
        module = f"module {self.module}" if self.module else "the model"
        size = "" if self.size is None else f", size {self.size}"
        return f"{module}: {self.name} gives {self.value} ({self.source or 'unknown line'}{size})"


def explain(loss: Tensor, doll: Doll, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """The message about a loss that is not finite."""
    value = [float(v) for v in loss.detach().flatten()[:1]]
    found = first_non_finite(doll, args, kwargs)
    if found is None:
        return (
            f"the loss is {value}, but the outputs are finite at every size: the criterion or its "
            "labels make it so (all labels ignored, a log of 0, a target out of range)."
        )
    return f"the loss is {value}. First non-finite value: {found}. {REMEDY}"


def first_non_finite(
    doll: Doll, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
) -> Blame | None:
    """Return the first culprit behind non-finite outputs, or None where every output is finite.

    Runs the doll at every size in its present mode, without gradients, and leaves the random state
    and the buffers alone. Infinities that an op takes in and does not pass on, such as those of an
    attention mask, are no culprits.

    Args:
        doll: the doll.
        args: positional inputs.
        kwargs: inputs by name.
    """
    trace, plan = trace_of(doll), doll.plan
    flat = trace.signature.flatten(args, kwargs or {})
    graph = outputs_graph(trace, plan, list(range(plan.levels)))
    watcher = Watcher(graph, doll)
    kept = {name: buffer.clone() for name, buffer in doll.named_buffers()}
    with forked(), torch.no_grad():
        watcher.run(*flat, enable_io_processing=False)
        for name, buffer in doll.named_buffers():
            buffer.copy_(kept[name])
    return culprit(graph, watcher.found, doll)


class Watcher(fx.Interpreter):
    """Runs a graph and keeps "nan" or "inf" of each node that has either."""

    def __init__(self, graph: fx.Graph, doll: Doll) -> None:
        super().__init__(trace_of(doll).root, graph=graph)
        self.found: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, looked at."""
        value = super().run_node(n)
        word = worst(value)
        if word:
            self.found[n] = word
        return value


def worst(value: object) -> str:
    """ "nan", "inf" or "" of a value's tensors."""
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if any(bool(t.isnan().any()) for t in floats):
        return "nan"
    return "inf" if any(not bool(t.isfinite().all()) for t in floats) else ""


def culprit(graph: fx.Graph, found: Mapping[fx.Node, str], doll: Doll) -> Blame | None:
    """The first node behind the output that made a non-finite value out of finite ones.

    An op that writes the infinities of a mask is none; then it is the first that turns them to nan.
    """
    output = output_node(graph)
    behind = ancestors(output, found)
    ordered = [node for node in graph.nodes if node in behind]
    roots = [n for n in ordered if not behind & set(n.all_input_nodes)]
    given = {n: {found.get(source) for source in n.all_input_nodes} for n in ordered}
    nans = [n for n in ordered if found[n] == "nan" and "nan" not in given[n]]
    first = next((n for n in roots if not masks(n, found[n])), next(iter(nans), None))
    return None if first is None else blame(first, found[first], doll)


def masks(node: fx.Node, value: str) -> bool:
    """Whether a node writes infinities on purpose."""
    return value == "inf" and op_of(node).fills


def ancestors(output: fx.Node, found: Mapping[fx.Node, str]) -> set[fx.Node]:
    """The non-finite nodes from which non-finite values reach the output."""
    return reached(
        filter(found.__contains__, output.all_input_nodes),
        lambda n: filter(found.__contains__, n.all_input_nodes),
    )


def blame(node: fx.Node, value: str, doll: Doll) -> Blame:
    """What a node is in the user's words."""
    source = node.meta.get("source", "")
    if node.op != "call_function":
        kind = "input" if node.op == "placeholder" else "parameter"
        return Blame(kind, str(node.target), "", source, None, value)
    name, level = node.meta.get("origin", (node.name, None))
    own = {n.name: n for n in trace_of(doll).graph.nodes}
    op = op_key(own.get(name, node))
    known = isinstance(level, int) and level in range(len(doll.sizes))
    size = doll.sizes[level] if known else None
    return Blame("op", op, module_of(node), source, size, value)


def module_of(node: fx.Node) -> str:
    """The module whose parameters a node reads, or that of the nearest node before it."""
    queue, seen = [node], {node}
    for current in queue:
        name = next((str(n.target) for n in states(current)), None)
        if name is not None:
            module = f"`{name.rpartition('.')[0] or name}`"
            return module if current is node else f"after {module}"
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return ""


def states(node: fx.Node) -> Iterable[fx.Node]:
    """The parameters and buffers that a node reads, directly or by a slice of them."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            yield argument
        elif argument.all_input_nodes and all(n.op == "get_attr" for n in argument.all_input_nodes):
            yield from argument.all_input_nodes
