"""written_out(): whether the user's line holds a number as such, and does not compute it.

x * 0.25 scales by a quarter at every width; x * d ** -0.5 does so where d is 16 alone.
"""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterator
from functools import lru_cache

from torch import fx

from matryoshkafy.graph.nodes import source_of

PLACE = re.compile(r"(.+):(\d+) \(")
COMPUTES = re.compile(r"\*\*|sqrt|pow")


def written_out(node: fx.Node, value: float) -> bool:
    """Tell whether the statement that made a node multiplies or divides by a number as written.

    A statement that also takes a root or a power may have computed it: that is no proof.
    """
    place = PLACE.match(source_of(node) or "")
    statement = _statement(place[1], int(place[2])) if place else None
    if statement is None or COMPUTES.search(ast.unparse(statement)):
        return False
    return value in _factors(statement)


def _statement(file: str, line: int) -> ast.stmt | None:
    """Return the innermost statement that holds a line; None where there is none."""
    around = [s for s in _statements(file) if s.lineno <= line <= (s.end_lineno or s.lineno)]
    return max(around, key=lambda s: s.lineno, default=None)


@lru_cache(maxsize=64)
def _statements(file: str) -> tuple[ast.stmt, ...]:
    """Return the simple statements of a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return ()
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
    return tuple(n for n in ast.walk(tree) if isinstance(n, simple))


def _factors(statement: ast.stmt) -> set[float]:
    """Return the numbers by which a statement multiplies or divides."""
    return {
        number
        for node in ast.walk(statement)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div))
        for side in (node.left, node.right)
        for number in _numbers(side)
    }


def _numbers(side: ast.expr) -> Iterator[float]:
    if isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.USub):
        yield from (-n for n in _numbers(side.operand))
    elif isinstance(side, ast.Constant) and type(side.value) in (int, float):
        yield float(side.value)  # type: ignore[arg-type]
