"""A configuration as a tree of plain values: its numbers, and copies in which some are changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

Field = tuple[Any, ...]
"""Where a number stands: the keys, attribute names and positions that lead to it."""

Changes = Mapping[Field, Any]
Tree = Any
"""Mappings, sequences, dataclasses and partial functions down to numbers, as a class takes them."""


def numbers(tree: Tree, at: Field = ()) -> Iterator[tuple[Field, int | float]]:
    """Yield every number of a tree with its field; truth values are none."""
    if isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield at, tree
    for key, child in _children(tree):
        yield from numbers(child, (*at, key))


def changed(tree: Tree, changes: Changes) -> Tree:
    """Return a copy of a tree with other values at some of its fields."""
    if () in changes:
        return changes[()]
    below: dict[object, dict[Field, Any]] = {}
    for field, value in changes.items():
        below.setdefault(field[0], {})[field[1:]] = value
    if not below:
        return tree
    return _rebuilt(tree, {key: changed(_child(tree, key), sub) for key, sub in below.items()})


def value_at(tree: Tree, field: Field) -> Tree:
    """Return the value that stands at a field."""
    return functools.reduce(_child, field, tree)


def named(field: Field) -> str:
    """Return a field as people write it: `text_config.hidden_size`, `dims[2]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in field)
    return text.removeprefix(".")


def _children(tree: Tree) -> list[tuple[Any, Tree]]:
    if isinstance(tree, Mapping):
        return list(cast("Mapping[object, object]", tree).items())
    if isinstance(tree, (list, tuple)):
        return list(enumerate(cast("Sequence[object]", tree)))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init]
    if isinstance(tree, functools.partial):
        return list(cast("functools.partial[object]", tree).keywords.items())
    return []


def _child(tree: Tree, key: object) -> Tree:
    return dict(_children(tree))[key]


def _rebuilt(tree: Tree, new: Mapping[Any, Tree]) -> Tree:
    if isinstance(tree, Mapping):
        return {**cast("Mapping[object, object]", tree), **new}
    if isinstance(tree, (list, tuple)):
        items = [new.get(i, item) for i, item in enumerate(cast("Sequence[object]", tree))]
        kind = cast("Callable[..., object]", type(cast("object", tree)))
        return kind(*items) if hasattr(cast("object", tree), "_fields") else kind(items)
    if isinstance(tree, functools.partial):
        held = cast("functools.partial[object]", tree)
        return functools.partial(held.func, *held.args, **{**held.keywords, **new})
    return dataclasses.replace(tree, **new)
