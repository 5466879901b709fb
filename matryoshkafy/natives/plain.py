"""The arguments of a user's class as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from matryoshkafy.natives.recipe import NativeError


def as_json(value: object, at: str = "") -> object:
    """Return plain values as JSON; raises NativeError that names an argument that is none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        parts = enumerate(cast("Sequence[object]", value))
        items = [as_json(item, f"{at}[{i}]") for i, item in parts]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        named = cast("Mapping[object, object]", value)
        if all(isinstance(key, str) for key in named):
            return {"dict": {key: as_json(item, f"{at}.{key}") for key, item in named.items()}}
    kind = type(cast("object", value)).__name__
    raise NativeError(
        f"the argument {at.removeprefix('.')} is a {kind}, which no JSON holds; "
        "expected numbers, texts, lists and dictionaries. Write a function of such arguments that "
        "builds the model, and give it as like."
    )


def is_json(value: Any) -> bool:
    """Tell whether `as_json` takes a value: classes and functions it does not."""
    try:
        as_json(value)
    except NativeError:
        return False
    return True


def from_json(value: Any) -> Any:
    """Read what `as_json` wrote."""
    if isinstance(value, list):
        return [from_json(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    held = cast("dict[str, Any]", value)
    if "tuple" in held:
        return tuple(from_json(item) for item in held["tuple"])
    return {str(key): from_json(item) for key, item in held["dict"].items()}
