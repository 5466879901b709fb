"""Builder: a random model is written once as code over values, and run at any width.

The first run chooses widths, makes weights and records a graph of ATen ops. A replay repeats the
same choices over the weights of a sub-model: it is what the same class would compute at that size,
and takes every size from the shapes at hand, as hand-written models do.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from matryoshkafy.graph.nodes import info_of
from matryoshkafy.graph.normalise import clean
from matryoshkafy.graph.signature import Input, Signature
from matryoshkafy.graph.trace import Trace

WIDTHS = (2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 12, 12, 16)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the run at hand, and the node that computes it."""

    tensor: Tensor
    node: fx.Node

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def width(self) -> int:
        return self.shape[-1]


@dataclass
class Run:
    """What a run draws from and leaves behind; `state`, `log`, `given` inputs are a replay's."""

    random: random.Random
    state: Mapping[str, Tensor] | None = None
    log: list[Any] = field(default_factory=list)
    given: Sequence[Tensor] = ()
    native: bool = True
    constant: bool = False
    copied: bool = False
    reordered: bool = False


class Builder:
    """Records a graph of ATen ops while it computes; `root` holds parameters and buffers."""

    def __init__(self, run: Run) -> None:
        self.run, self.graph, self.root = run, fx.Graph(), nn.Module()
        self.inputs: list[Value] = []
        self.used: set[fx.Node] = set()
        self.made = 0
        self._replayed: Iterator[Any] = iter(run.log) if run.state is not None else iter(())

    # Choices: drawn in the first run, repeated in a replay.

    def choose(self, options: Sequence[Any]) -> Any:
        """Return one of the options; a replay returns what the first run did."""
        if self.run.state is not None:
            return next(self._replayed)
        self.run.log.append(self.run.random.choice(options))
        return self.run.log[-1]

    def width(self) -> int:
        """Return a random width."""
        return self.choose(WIDTHS)

    def chance(self, percent: int) -> bool:
        """Return True about that often."""
        return self.choose([i < percent for i in range(100)])

    def divisor(self, n: int) -> int:
        """Return a divisor that a replay keeps (a head dim), or the whole width (one head)."""
        dim = self.choose([d for d in range(1, n) if n % d == 0] + [None])
        self.run.constant |= dim is not None
        return dim or n

    def decide(self, answer: bool) -> bool:
        """Return what the first run found: a replay has other sizes, but the same layers."""
        return self.choose((answer,))

    # Leaves.

    def input(self, tensor: Tensor) -> Value:
        """Return an input of the model."""
        at = len(self.inputs)
        node = self.graph.placeholder(f"x{at}")
        self.inputs.append(self._value(node, self.run.given[at] if self.run.given else tensor))
        return self.inputs[-1]

    def param(self, *shape: int, scale: float = 1.0) -> Value:
        """Return a new parameter; in a replay the sub-model's, of whatever shape it has."""
        return self._state(lambda: nn.Parameter(scale * self._noise(shape)))

    def buffer(self, *shape: int) -> Value:
        """Return a new positive float buffer."""
        return self._state(lambda: self._noise(shape).abs() + 0.5)

    def indices(self, values: Sequence[int]) -> Value:
        """Return an integer buffer."""
        return self._state(lambda: torch.tensor(list(values)))

    def again(self, value: Value) -> Value:
        """Return a second reading of a parameter: a tie."""
        node = self.graph.get_attr(str(value.node.target))
        return self._value(node, value.tensor)

    def _noise(self, shape: Sequence[int]) -> Tensor:
        seed = self.run.random.randrange(2**31)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def _state(self, make: Callable[[], Tensor]) -> Value:
        name = f"p{self.made}"
        self.made += 1
        tensor = make() if self.run.state is None else self.run.state[name]
        if isinstance(tensor, nn.Parameter):
            self.root.register_parameter(name, tensor)
        else:
            self.root.register_buffer(name, tensor)
        return self._value(self.graph.get_attr(name), tensor)

    # Ops.

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute an ATen op and record it; several results come as a tuple of values."""
        given = _mapped((args, kwargs), lambda v: v.tensor)
        nodes = _mapped((args, kwargs), lambda v: v.node)
        self.used |= set(_nodes(nodes))
        with torch.no_grad():
            result = target(*given[0], **given[1])
        node = self.graph.call_function(target, *nodes)
        if isinstance(result, Tensor):
            return self._value(node, result)
        node.meta = {"info": info_of(tuple(result)), "source": ""}
        return tuple(self._picked(node, i, t) for i, t in enumerate(result))

    def _picked(self, node: fx.Node, index: int, tensor: Tensor) -> Value:
        self.used.add(node)
        return self._value(self.graph.call_function(operator.getitem, (node, index)), tensor)

    def _value(self, node: fx.Node, tensor: Tensor) -> Value:
        node.meta = {"info": info_of(tensor), "source": ""}
        return Value(tensor, node)

    def unused(self, values: Sequence[Value]) -> list[Value]:
        """Return the values that nothing reads."""
        return [v for v in values if v.node not in self.used]

    # Results.

    def finish(self, outputs: Sequence[Value]) -> fx.GraphModule:
        """Return the recorded model as a module of the outputs."""
        self.graph.output(tuple(v.node for v in outputs))
        return fx.GraphModule(self.root, self.graph)


def direct_trace(model: fx.GraphModule, inputs: Sequence[Tensor]) -> Trace:
    """Return the trace of a recorded model, as tracing it would give, without torch.export."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(model.graph, memo)
    graph.output(list(outputs))
    for old, new in memo.items():
        new.meta = dict(old.meta)
    clean(graph, model)
    names = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
    leaf = pytree.tree_structure(0)
    taken = tuple(Input(n, leaf, (None,), (True,)) for n in names)
    spec = pytree.tree_structure(tuple(range(len(outputs))))
    assert len(names) == len(inputs)
    return Trace(graph, Signature(tuple(names), taken, spec), model)


def _mapped(value: Any, change: Callable[[Value], Any]) -> Any:
    if isinstance(value, Value):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    for inner in value if isinstance(value, (tuple, list)) else ():
        yield from _nodes(inner)
    for inner in value.values() if isinstance(value, dict) else ():
        yield from _nodes(inner)
