"""propagate(): one walk over the graph; afterwards every dimension of every value has a term."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Reason, Term
from matryoshkafy.graph.nodes import (
    Info,
    TensorInfo,
    bound_args,
    gives_several,
    info_of,
    is_item,
    op_key,
)
from matryoshkafy.graph.trace import Trace
from matryoshkafy.rules import Terms, op_of
from matryoshkafy.rules.weights import is_weight

# A prime that is no width: a size that only data decides must not align with one by its value.
UNKNOWN_SIZE = 1_000_003


Outputs = tuple[Terms, ...]


@dataclass
class Findings:
    """What one walk found: terms of each output of each node, and what each node sums over or takes
    statistics of.
    """

    terms: dict[fx.Node, tuple[Terms, ...]] = field(default_factory=dict[fx.Node, Outputs])
    notes: dict[fx.Node, dict[str, Term]] = field(default_factory=dict[fx.Node, dict[str, Term]])
    contracted: dict[fx.Node, list[Term]] = field(default_factory=dict[fx.Node, list[Term]])
    mixed: dict[fx.Node, list[Term]] = field(default_factory=dict[fx.Node, list[Term]])
    features: list[Term] = field(default_factory=list[Term])
    pure: set[fx.Node] = field(default_factory=set[fx.Node])
    unknown: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])

    def of(self, node: fx.Node) -> Terms:
        """Return the terms of the one tensor that a node gives; () of several, or of none."""
        outputs = self.terms[node]
        return outputs[0] if len(outputs) == 1 else ()

    def flat(self, node: fx.Node) -> list[Term]:
        """Return the terms of every dimension of every output of a node."""
        return [term for terms in self.terms.get(node, ()) for term in terms]

    def all_terms(self) -> Iterator[Term]:
        """Yield the term of every dimension of every value."""
        for node in self.terms:
            yield from self.flat(node)


def propagate(trace: Trace, free: tuple[str, ...] = ()) -> Findings:
    """Walk the graph once; `free` names inputs whose last axis may nest."""
    walker = _Walker(trace, Findings(), free)
    for node in trace.graph.nodes:
        walker.visit(node)
    _fix_counted(trace.graph, walker.found)
    return walker.found


def _fix_counted(graph: fx.Graph, found: Findings) -> None:
    """0, 1, 2, ... may shrink only where the kept units are a prefix of the counted ones."""
    for node in graph.nodes:
        if not op_of(node).counts:
            continue
        for term in found.flat(node):
            factors = axes.resolve(term)
            if len(factors) != 1 or not isinstance(factors[0], Axis):
                axes.fix(term, Reason("range", node.name))


class _Walker:
    """The `Walk` of the rules: it knows the node at hand, and says where an axis was born."""

    def __init__(self, trace: Trace, found: Findings, free: tuple[str, ...]) -> None:
        self.found, self.free = found, free
        self.state = trace.state()
        self.tied: dict[int, Terms] = {}
        self.births = itertools.count()
        self.node: fx.Node | None = None

    # What rules ask for.

    def of(self, value: object) -> Terms:
        return self.found.of(value) if isinstance(value, fx.Node) else ()

    def shape(self, value: object) -> tuple[int, ...]:
        info = info_of(value) if isinstance(value, fx.Node) else None
        return _known(info.shape) if isinstance(info, TensorInfo) else ()

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        info = info_of(node)
        infos = info if isinstance(info, tuple) else (info,)
        return [_known(i.shape) if isinstance(i, TensorInfo) else () for i in infos]

    def unify(self, a: Term, b: Term) -> Term:
        axes.unify(a, b, self._reason("misaligned"))
        return axes.resolve(a)

    def fix(self, term: Term, kind: str) -> Term:
        axes.fix(term, self._reason(kind))
        return term

    def fresh(self, size: int, kind: str | None = None, name: str = "") -> Term:
        if size == 1:
            return ()
        reason = self._reason(kind) if kind else None
        called = f"{self.node}.{name}" if name else str(self.node)
        return (Axis(size, called, reason, self.births),)

    def weight(self, value: object, *dims: int) -> None:
        if isinstance(value, fx.Node) and (value in self.found.pure or is_weight(value)):
            terms = self.of(value)
            self.found.features.extend(terms[d] for d in dims if -len(terms) <= d < len(terms))

    def is_feature(self, term: Term) -> bool:
        mine = set(axes.leaves(term))
        return any(not mine.isdisjoint(axes.leaves(t)) for t in self.found.features)

    def contract(self, term: Term) -> None:
        self.found.contracted.setdefault(self._here(), []).append(term)

    def mix(self, term: Term) -> None:
        self.found.mixed.setdefault(self._here(), []).append(term)

    def note(self, name: str, term: Term) -> None:
        self.found.notes.setdefault(self._here(), {})[name] = term

    # The walk itself.

    def visit(self, node: fx.Node) -> None:
        self.node = node
        if node.op == "placeholder":
            self.found.terms[node] = (self._input(node),)
        elif node.op == "get_attr":
            self.found.pure.add(node)
            self.found.terms[node] = (self._state(node),)
        elif node.op == "call_function":
            self._call(node)

    def _here(self) -> fx.Node:
        assert self.node is not None
        return self.node

    def _reason(self, kind: str) -> Reason:
        return Reason(kind, self._here().name)

    def _input(self, node: fx.Node) -> Terms:
        shape = self.shape(node)
        free = node.name in self.free
        last = len(shape) - 1
        return tuple(
            self.fresh(n, None if free and i == last else "input", f"dim{i}")
            for i, n in enumerate(shape)
        )

    def _state(self, node: fx.Node) -> Terms:
        tensor = self.state.get(str(node.target))
        if tensor is None:
            return ()
        if id(tensor) not in self.tied:
            self.tied[id(tensor)] = self._born(str(node.target), self.shape(node), tensor)
        return self.tied[id(tensor)]

    def _born(self, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> Terms:
        # Integers are indices or counts, and a sparse tensor cannot be cut: neither holds features.
        integers = not (tensor.is_floating_point() or tensor.is_complex())
        reason = Reason("indexed", name) if integers or tensor.layout != torch.strided else None
        return tuple(
            (Axis(n, f"{name}:{i}", reason, self.births),) if n != 1 else ()
            for i, n in enumerate(shape)
        )

    def _call(self, node: fx.Node) -> None:
        if not _has_tensor(info_of(node)):
            self.found.terms[node] = ()
            return
        inputs = [a for a in node.all_input_nodes if a in self.found.terms]
        tensors = [a for a in inputs if _has_tensor(info_of(a))]
        # Made of parameters alone: it may stand where a weight is read.
        if tensors and all(a in self.found.pure for a in tensors):
            self.found.pure.add(node)
        if is_item(node):
            source, index = node.all_input_nodes[0], cast("int", node.args[1])
            self.found.terms[node] = (self.found.terms[source][index],)
            return
        self.found.terms[node] = self._applied(node)

    def _applied(self, node: fx.Node) -> Outputs:
        row, name = op_of(node), op_key(node)
        try:
            terms = row.axes(self, node, bound_args(node)) if row.axes else None
            outputs = terms if gives_several(node) or terms is None else (terms,)
            if outputs is not None and self._fits(node, cast("Outputs", outputs)):
                return cast("Outputs", outputs)
        except Exception as error:  # noqa: BLE001  a use that a rule did not foresee stays whole
            name = f"{name} (its rule raised {type(error).__name__}: {error})"
        self.found.unknown.append((name, node.name, node.meta.get("source") or ""))
        return self._frozen(node)

    def _fits(self, node: fx.Node, outputs: Outputs) -> bool:
        shapes = self.shapes(node)
        return len(outputs) >= len(shapes) and all(
            len(t) == len(s) and all(axes.size(x) == n for x, n in zip(t, s, strict=True))
            for t, s in zip(outputs, shapes, strict=False)
        )

    def _frozen(self, node: fx.Node) -> Outputs:
        """No rule: whatever the op touches stays whole, on both sides."""
        for value in node.all_input_nodes:
            for term in self.found.flat(value):
                self.fix(term, "unknown op")
        return tuple(tuple(self.fresh(n, "unknown op") for n in s) for s in self.shapes(node))


def _known(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A size that only the data decides (nonzero) is no width: it gets a size of its own."""
    return tuple(UNKNOWN_SIZE if n < 0 else n for n in shape)


def _has_tensor(info: Info) -> bool:
    if isinstance(info, tuple):
        return any(_has_tensor(i) for i in info)
    return isinstance(info, TensorInfo)
