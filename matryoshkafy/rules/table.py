"""The rule table: how axes cross each op. A rule is a row; adding an op adds a row.

A rule receives the walk (where terms are looked up, made one, or held fixed), the node, and the
node's arguments by their schema names; it returns the terms of the output, one per dimension (a
tuple of such tuples where the op returns several tensors). Rules never traverse and keep no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import fx

from matryoshkafy.axes.terms import Term
from matryoshkafy.graph.nodes import op_key

Terms = tuple[Term, ...]
Args = Mapping[str, Any]


class Walk(Protocol):
    """What a rule may ask for while the graph is walked once."""

    def of(self, value: Any) -> Terms:
        """Return the terms of a traced tensor, one per dimension."""
        ...

    def shape(self, value: Any) -> tuple[int, ...]:
        """Return the concrete shape of a traced tensor."""
        ...

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the concrete shapes of all outputs of a node."""
        ...

    def unify(self, a: Term, b: Term) -> Term:
        """Make two terms one; where they cannot be aligned both are held fixed."""
        ...

    def fix(self, term: Term, kind: str) -> Term:
        """Hold a term at its full size; `kind` is a word of the plan's vocabulary."""
        ...

    def fresh(self, size: int, kind: str | None = None, name: str = "") -> Term:
        """Return a new axis; fixed from the start where `kind` says why."""
        ...

    def weight(self, value: Any, *dims: int) -> None:
        """Mark dims of a value that comes from parameters alone as features."""
        ...

    def contract(self, term: Term) -> None:
        """Record that the node at hand sums over the term."""
        ...

    def mix(self, term: Term) -> None:
        """Record that the node at hand takes statistics over the term."""
        ...

    def note(self, name: str, term: Term) -> None:
        """Keep a term that the rewriting of this node needs (the groups of a convolution)."""
        ...


Rule = Callable[[Walk, fx.Node, Args], Any]

RULES: dict[str, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ops: overloads (`torch.ops.mylib.scan.default`), packets, or schema
    names.

    Example:
        @mk.rule(torch.ops.mylib.scan)
        def scan(walk, node, args):
            return walk.of(args["x"])

    Registering an op twice raises `ValueError`: two rules for one op would be a guess.
    """

    def register(function: Rule) -> Rule:
        for key in map(op_key, ops):
            if key in RULES:
                raise ValueError(f"{key!r} has a rule already ({RULES[key].__name__})")
            RULES[key] = function
        return function

    return register
