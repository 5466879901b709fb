"""calls_of(), argument(), keywords(): what the calls of a file hand over, as syntax.

A layer scales by what it was made with, Scale(math.sqrt(width)), and a configuration holds what it
was made with, Config(scale=0.1).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from itertools import takewhile

from matryoshkafy.graph.imports import parsed, users_of

# Of a helper that is called everywhere no call says more than the next.
MOST = 8


@lru_cache(maxsize=1024)
def calls_of(file: str, name: str, *, everywhere: bool) -> list[tuple[str, ast.Call]]:
    """Return the calls of a function or a class in its file, and in those that import it where
    they are asked for; none where there are too many.
    """
    files = users_of(file, name) if everywhere else (file,)
    trees = [(f, parsed(f)) for f in files]
    found = [(f, call) for f, tree in trees if tree for call in _calls(tree).get(name, ())]
    return found if everywhere or len(found) <= MOST else []


def argument(call: ast.Call, name: str, index: int | None) -> Iterator[ast.expr]:
    """Yield what a call hands over by a name, or at a place before any *arguments."""
    yield from (k.value for k in call.keywords if k.arg == name)
    before = list(takewhile(lambda a: not isinstance(a, ast.Starred), call.args))
    if index is not None and 0 <= index < len(before):
        yield before[index]


@lru_cache(maxsize=64)
def keywords(tree: ast.Module) -> dict[str, list[tuple[ast.expr, ast.Call]]]:
    """Return {name: what the calls of a file hand over by it, and the calls}."""
    found: dict[str, list[tuple[ast.expr, ast.Call]]] = {}
    for call in (call for calls in _calls(tree).values() for call in calls):
        for given in call.keywords:
            found.setdefault(given.arg or "", []).append((given.value, call))
    return found


@lru_cache(maxsize=64)
def _calls(tree: ast.Module) -> dict[str, list[ast.Call]]:
    """Return {name: the calls of it in a file}."""
    found: dict[str, list[ast.Call]] = {}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        named = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        name = named.id if isinstance(named, ast.Name) else named
        found.setdefault(name if isinstance(name, str) else "", []).append(node)
    return found
