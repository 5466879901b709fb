"""The arguments of a user's class as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matryoshkafy.natives.recipe import NativeError


def as_json(value: Any, at: str = "") -> Any:
    """Return plain values as JSON; raises NativeError that names an argument that is none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [as_json(item, f"{at}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: as_json(item, f"{at}.{key}") for key, item in value.items()}}
    raise NativeError(
        f"the argument {at.removeprefix('.')} is a {type(value).__name__}, which no JSON holds; "
        "expected numbers, texts, lists and dictionaries. Write a function of such arguments that "
        "builds the model, and give it as like."
    )


def from_json(value: Any) -> Any:
    """Read what `as_json` wrote."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict) and "tuple" in value:
        return tuple(from_json(item) for item in value["tuple"])
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value["dict"].items()}
    return value
