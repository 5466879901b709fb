"""A configuration as a tree of plain values: its numbers, and copies in which some are changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

Field = tuple[Any, ...]
"""Where a number stands: the keys, attribute names and positions that lead to it."""

Changes = Mapping[Field, Any]


def numbers(tree: Any, at: Field = ()) -> Iterator[tuple[Field, int | float]]:
    """Yield every number of a tree with its field; truth values are none."""
    if isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield at, tree
    for key, child in _children(tree):
        yield from numbers(child, (*at, key))


def changed(tree: Any, changes: Changes) -> Any:
    """Return a copy of a tree with other values at some of its fields."""
    if () in changes:
        return changes[()]
    below: dict[Any, dict[Field, Any]] = {}
    for field, value in changes.items():
        below.setdefault(field[0], {})[field[1:]] = value
    if not below:
        return tree
    return _rebuilt(tree, {key: changed(_child(tree, key), sub) for key, sub in below.items()})


def value_at(tree: Any, field: Field) -> Any:
    """Return the value that stands at a field."""
    return functools.reduce(_child, field, tree)


def named(field: Field) -> str:
    """Return a field as people write it: `text_config.hidden_size`, `dims[2]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in field)
    return text.removeprefix(".")


def _children(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, (list, tuple)):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init]
    if isinstance(tree, functools.partial):
        return list(tree.keywords.items())
    return []


def _child(tree: Any, key: Any) -> Any:
    return dict(_children(tree))[key]


def _rebuilt(tree: Any, new: Mapping[Any, Any]) -> Any:
    if isinstance(tree, Mapping):
        return {**tree, **new}
    if isinstance(tree, (list, tuple)):
        items = [new.get(i, item) for i, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, functools.partial):
        return functools.partial(tree.func, *tree.args, **{**tree.keywords, **new})
    return dataclasses.replace(tree, **new)
