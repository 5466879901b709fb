"""JSON out of files that nobody vouches for; no torch."""

from __future__ import annotations

import json
import reprlib
from typing import Any

from matryoshkafy.errors import MatryoshkafyError

MAX_JSON_BYTES = 64 * 2**20
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


class JsonError(MatryoshkafyError):
    """A value that cannot be written as JSON, or JSON that is not what it should be."""


def parse_json(text: bytes, what: str) -> Any:
    """Return the value of a JSON text.

    what: how an error calls the file. Raises JsonError for a text that is too long or nested too
    deeply, is no UTF-8 or no JSON, repeats a key, or has NaN or Infinity, which JSON lacks.
    """
    if len(text) > MAX_JSON_BYTES:
        raise JsonError(f"{what} has {len(text)} bytes of JSON, at most {MAX_JSON_BYTES} expected.")
    try:
        decoded = text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise JsonError(f"{what} is JSON nested too deeply; it is damaged or hostile.") from None
    except ValueError as error:
        raise JsonError(f"{what} is no sound JSON: {str(error)[:120]}. It is damaged.") from None


def shown(value: object) -> str:
    """Return a value for an error message, cut to one short line."""
    text = SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("an object repeats a key")
    return read


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
