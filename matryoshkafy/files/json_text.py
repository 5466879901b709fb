"""JSON out of files that nobody vouches for; no torch."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeGuard

from matryoshkafy.errors import MatryoshkafyError

MAX_JSON_BYTES = 32 * 2**20
# What the values of a text may take once they are Python objects; a text is at most a tenth of it.
MAX_JSON_MEMORY = 320 * 2**20
# Measured with CPython 3.11, rounded up: an empty object and its first key, a list, one more item.
OBJECT_BYTES, LIST_BYTES, ITEM_BYTES = 300, 90, 100
OWN_DIGEST = "sha256"
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


# An object of JSON that was checked to be one: each reader says what it expects inside.
Json = Mapping[str, Any]


class JsonError(MatryoshkafyError):
    """A value that cannot be written as JSON, or JSON that is not what it should be."""


def signed(value: Json) -> Json:
    """Return an object of JSON with the SHA-256 of all else that it holds, however it is laid out.

    A flipped bit in a number makes JSON that is as sound.
    """
    rest = {name: each for name, each in value.items() if name != OWN_DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**rest, OWN_DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def check_signed(value: Json, what: str) -> None:
    """Raise JsonError for an object that is not what was signed; earlier versions signed none."""
    if OWN_DIGEST in value and signed(value)[OWN_DIGEST] != value[OWN_DIGEST]:
        raise JsonError(
            f"{what} is not what was saved: its own SHA-256 differs. The file is damaged: copy it "
            "again, or save the model again."
        )


def parse_json(text: bytes, what: str) -> Any:
    """Return the value of a JSON text.

    what: how an error calls the file. Raises JsonError for a text that is too long or nested too
    deeply, is no UTF-8 or no JSON, repeats a key, or has NaN or Infinity, which JSON lacks.
    """
    if len(text) > MAX_JSON_BYTES:
        raise JsonError(f"{what} has {len(text)} bytes of JSON, at most {MAX_JSON_BYTES} expected.")
    if memory_of(text) > MAX_JSON_MEMORY:
        raise JsonError(
            f"{what} holds more values than any model needs (over {MAX_JSON_MEMORY >> 20} MiB in "
            "memory); it is damaged or hostile."
        )
    try:
        decoded = text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise JsonError(f"{what} is JSON nested too deeply; it is damaged or hostile.") from None
    except ValueError as error:
        raise JsonError(f"{what} is no sound JSON: {str(error)[:120]}. It is damaged.") from None


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Tell whether a value of JSON is an object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Tell whether a value of JSON is a list."""
    return isinstance(value, list)


def memory_of(text: bytes) -> int:
    """Return about how many bytes the values of a JSON text take; never much less than they do."""
    counts = text.count(b"{"), text.count(b"["), text.count(b",") + text.count(b":")
    objects, lists, items = counts
    return 2 * len(text) + OBJECT_BYTES * objects + LIST_BYTES * lists + ITEM_BYTES * items


def printable(text: str) -> str:
    """Return a text in which nothing moves a cursor, hides or turns around what a terminal shows.

    Line breaks stay; every other character that does not print becomes its escape, as in repr.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def escaped(value: object) -> Any:
    """Return JSON whose texts, keys among them, are printable and of one line each.

    What a file calls a group or a line of code is shown in tables, warnings and errors, whoever
    prints them.
    """
    if isinstance(value, str):
        return printable(value).replace("\n", "\\n")
    if is_list(value):
        return [escaped(item) for item in value]
    if is_object(value):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return value


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
