"""Rows of a table over the zoo, appended to a file as they come and never measured twice."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from tests.zoo.registry import Entry, entries

Row = TypeVar("Row")


def measured_rows(
    names: Iterable[str], path: Path, kind: type[Row], measure: Callable[[Entry], Row]
) -> list[Row]:
    """Return what the file holds, and a row for each name that it lacks; every entry without names.

    `kind` is a dataclass with a `name`; new rows are printed.
    """
    warnings.simplefilter("ignore")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {row["name"]: kind(**row) for row in map(json.loads, lines)}
    for entry in entries(list(names) or None):
        if entry.name not in rows and "large" not in entry.tags:
            rows[entry.name] = row = measure(entry)
            with path.open("a") as sink:
                sink.write(json.dumps(asdict(row)) + "\n")  # type: ignore[call-overload]
            print(row, flush=True)
    return list(rows.values())
