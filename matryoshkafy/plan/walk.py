"""propagate(): one walk over the graph; afterwards every dimension of every value has a term."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Reason, Term
from matryoshkafy.graph.nodes import TensorInfo, bound_args, info_of, is_item, op_key
from matryoshkafy.graph.trace import Trace
from matryoshkafy.rules import Terms, op_of
from matryoshkafy.rules.weights import is_weight

UNKNOWN_SIZE = 1_000_003


@dataclass
class Findings:
    """What one walk found: terms per node, and what each node sums over or takes statistics of."""

    terms: dict[fx.Node, Any] = field(default_factory=dict)
    notes: dict[fx.Node, dict[str, Term]] = field(default_factory=dict)
    contracted: dict[fx.Node, list[Term]] = field(default_factory=dict)
    mixed: dict[fx.Node, list[Term]] = field(default_factory=dict)
    features: list[Term] = field(default_factory=list)
    pure: set[fx.Node] = field(default_factory=set)
    unknown: list[tuple[str, str, str]] = field(default_factory=list)
    roots: dict[int, str] = field(default_factory=dict)

    def all_terms(self) -> Iterator[Term]:
        """Yield the term of every dimension of every value."""
        for terms in self.terms.values():
            yield from flat_terms(terms)


def flat_terms(terms: Any) -> Iterator[Term]:
    """Yield the terms of one value, or of each of several."""
    if (
        terms
        and isinstance(terms[0], tuple)
        and any(isinstance(t, tuple) and t and isinstance(t[0], tuple) for t in terms)
    ):
        for inner in terms:
            yield from inner
    else:
        yield from terms


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
        for term in found.terms[node]:
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

    def of(self, value: Any) -> Terms:
        return self.found.terms[value] if isinstance(value, fx.Node) else ()

    def shape(self, value: Any) -> tuple[int, ...]:
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

    def weight(self, value: Any, *dims: int) -> None:
        if value in self.found.pure or is_weight(value):
            terms = self.of(value)
            self.found.features.extend(terms[d] for d in dims if -len(terms) <= d < len(terms))

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
            self.found.terms[node] = self._input(node)
        elif node.op == "get_attr":
            self.found.pure.add(node)
            self.found.terms[node] = self._state(node)
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

    def _born(self, name: str, shape: tuple[int, ...], tensor: Any) -> Terms:
        integers = not (tensor.is_floating_point() or tensor.is_complex())
        reason = (
            Reason("indexed", name)
            if integers or tensor.layout.__str__() != "torch.strided"
            else None
        )
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
        if tensors and all(a in self.found.pure for a in tensors):
            self.found.pure.add(node)
        if is_item(node):
            self.found.terms[node] = self.found.terms[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        self.found.terms[node] = self._applied(node)

    def _applied(self, node: fx.Node) -> Any:
        row, name = op_of(node), op_key(node)
        try:
            terms = row.axes(self, node, bound_args(node)) if row.axes else None
            if terms is not None and self._fits(node, terms):
                return terms
        except Exception as error:  # noqa: BLE001  a use that a rule did not foresee stays whole
            name = f"{name} (its rule raised {type(error).__name__}: {error})"
        self.found.unknown.append((name, node.name, node.meta.get("source") or ""))
        return self._frozen(node)

    def _fits(self, node: fx.Node, terms: Any) -> bool:
        info = info_of(node)
        groups = terms if isinstance(info, tuple) else (terms,)
        shapes = self.shapes(node)
        return len(groups) >= len(shapes) and all(
            len(t) == len(s) and all(axes.size(x) == n for x, n in zip(t, s, strict=True))
            for t, s in zip(groups, shapes, strict=False)
        )

    def _frozen(self, node: fx.Node) -> Any:
        """No rule: whatever the op touches stays whole, on both sides."""
        for value in node.all_input_nodes:
            for term in flat_terms(self.found.terms.get(value, ())):
                self.fix(term, "unknown op")
        outs = tuple(tuple(self.fresh(n, "unknown op") for n in s) for s in self.shapes(node))
        return outs if isinstance(info_of(node), tuple) else outs[0]


def _known(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A size that only the data decides (nonzero) is no width: it gets a size of its own."""
    return tuple(UNKNOWN_SIZE if n < 0 else n for n in shape)


def _has_tensor(info: Any) -> bool:
    if isinstance(info, tuple):
        return any(_has_tensor(i) for i in info)
    return isinstance(info, TensorInfo)
