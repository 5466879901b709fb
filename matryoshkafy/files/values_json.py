"""Python values as JSON, without loss and without code: what graphs and structures are made of."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from matryoshkafy.files.json_text import JsonError, is_list, is_object, shown

MAX_DEPTH = 32
MAX_TEXT = 16_384
UNBOUNDED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")

T = TypeVar("T")
Walk = Callable[[Any], Any]
Convert = Callable[[Any, Walk], Any]  # writes or reads a value, and by the walk what is in it


def is_name(name: object) -> TypeGuard[str]:
    """Tell whether a value is a short ASCII identifier, safe in generated code."""
    return (
        isinstance(name, str)
        and IDENTIFIER.fullmatch(name) is not None
        and not keyword.iskeyword(name)
    )


def torch_constant(kind: type[T]) -> Callable[[Any, Walk], T]:
    """Return the reader of constants such as torch.float32 by their name, "float32"."""

    def read(name: object, walk: Walk) -> T:
        found = getattr(torch, name, None) if is_name(name) else None
        if not isinstance(found, kind):
            raise ValueError(name)
        return found

    return read


def write_constant(value: object, walk: Walk | None = None) -> str:
    """Return the name that torch_constant reads: torch.float32 -> "float32"."""
    return str(value).removeprefix("torch.")


@dataclass(frozen=True)
class Values:
    """Writes and reads the values at one place; a plain JSON string names a node of the graph.

    None, booleans, integers, finite floats and lists stand for themselves, everything else is an
    object with one key, the tag of its row in CODECS. Raises JsonError, which names the place.
    """

    place: str
    nodes: Mapping[str, Node]

    def write(self, value: object, depth: int = 0) -> object:
        """Return a value as JSON."""
        self._check_depth(depth)
        if isinstance(value, Node):
            return value.name
        if value is None or type(value) in (bool, int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        if is_list(value):
            return [self.write(item, depth + 1) for item in value]
        for codec in CODECS:
            if isinstance(value, codec.type) and not pytree.is_namedtuple_instance(value):
                return {codec.tag: codec.write(value, lambda item: self.write(item, depth + 1))}
        kind = type(value)
        raise JsonError(
            f"{self.place} has a value of type {kind.__module__}.{kind.__qualname__}, which cannot "
            f"be saved. Make it a number, a text, a list, or a buffer of the model."
        )

    def read(self, item: object, depth: int = 0) -> Any:
        """Return the value that JSON stands for."""
        self._check_depth(depth)
        if item is None or isinstance(item, (bool, int, float)):
            return item
        if is_list(item):
            return [self.read(each, depth + 1) for each in item]
        if isinstance(item, str):
            return self._node(item)
        return self._tagged(item, depth)

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise JsonError(f"{self.place} uses {shown(name)}, but no node before it is called so.")
        return self.nodes[name]

    def _tagged(self, item: object, depth: int) -> Any:
        if not is_object(item) or len(item) != 1 or next(iter(item)) not in BY_TAG:
            raise JsonError(f"{self.place} has the value {shown(item)}, of no known type.")
        ((tag, content),) = item.items()
        try:
            return BY_TAG[tag].read(content, lambda each: self.read(each, depth + 1))
        except JsonError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError, OverflowError):
            raise JsonError(f"{self.place} has {shown(item)}, which is no {tag}.") from None

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise JsonError(f"{self.place} nests its values more than {MAX_DEPTH} deep.")


@dataclass(frozen=True)
class Codec:
    """How one type is written under its tag; walk writes or reads the values inside."""

    tag: str
    type: type[Any]
    write: Convert
    read: Convert


def _several(count: int | None, build: Callable[..., object]) -> Convert:
    def read(items: object, walk: Walk) -> object:
        if not is_list(items) or count not in (None, len(items)):
            raise TypeError(items)
        return build(*map(walk, items))

    return read


def _read_text(text: object, walk: Walk) -> str:
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise TypeError(text)
    return text


def _read_dict(pairs: list[Any], walk: Walk) -> dict[object, object]:
    read = {walk(key): walk(item) for key, item in pairs}
    if len(read) != len(pairs) or not all(_is_plain(key) for key in read):
        raise TypeError(pairs)
    return read


def _write_bounds(value: Any, walk: Walk) -> list[object]:
    return [walk(bound) for bound in (value.start, value.stop, value.step)]


def _is_plain(key: object) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_plain, cast("tuple[object, ...]", key)))
    return key is None or isinstance(key, (str, int, float))


CODECS = (
    Codec("str", str, lambda text, _: str(text), _read_text),
    Codec("tuple", tuple, lambda v, walk: [*map(walk, v)], _several(None, lambda *items: items)),
    Codec("dict", dict, lambda v, walk: [[walk(k), walk(i)] for k, i in v.items()], _read_dict),
    # Finite floats stand for themselves: these are "inf", "-inf" and "nan".
    Codec("float", float, lambda v, _: repr(float(v)), lambda text, _: UNBOUNDED[text]),
    Codec("complex", complex, lambda v, walk: [walk(v.real), walk(v.imag)], _several(2, complex)),
    Codec("slice", slice, _write_bounds, _several(3, slice)),
    Codec("range", range, _write_bounds, _several(3, range)),
    Codec("dtype", torch.dtype, write_constant, torch_constant(torch.dtype)),
    Codec("layout", torch.layout, write_constant, torch_constant(torch.layout)),
    Codec(
        "memory_format", torch.memory_format, write_constant, torch_constant(torch.memory_format)
    ),
    Codec(
        "device",
        torch.device,
        lambda v, _: str(v),
        lambda text, walk: torch.device(_read_text(text, walk)),
    ),
    Codec("ellipsis", type(...), lambda _, walk: True, lambda _, walk: ...),
)
BY_TAG = {codec.tag: codec for codec in CODECS}
