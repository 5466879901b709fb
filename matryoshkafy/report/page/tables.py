"""What `matryoshkafy retrieve --tune` and `matryoshkafy cascade` print with --json, read again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from matryoshkafy.report.page.contents import Answer, Cascading, ReportError, Search

PathLike = str | os.PathLike[str]
Made = TypeVar("Made")


def read_searches(path: PathLike) -> tuple[Search, ...]:
    """Read the settings that `matryoshkafy retrieve --tune COLUMN --json` printed.

    Raises:
        ReportError: for any other file.
    """
    return _read(path, searches_of, "matryoshkafy retrieve ... --tune COLUMN --json")


def read_cascade(path: PathLike) -> Cascading:
    """Read what `matryoshkafy cascade LOGITS --json` printed.

    Raises:
        ReportError: for any other file.
    """
    return _read(path, cascade_of, "matryoshkafy cascade LOGITS --json")


def searches_of(told: Mapping[str, Any]) -> tuple[Search, ...]:
    """Return the settings of {"settings": [{"stages", "recall", ...}]}."""
    return tuple(
        Search(
            str(row["stages"]),
            float(row["recall"]),
            float(row["reciprocal_rank"]),
            float(row["products"]),
        )
        for row in told["settings"]
    )


def cascade_of(told: Mapping[str, Any]) -> Cascading:
    """Return the cascade of {"accuracy", "cost", "sizes": [{"size", "threshold", ...}]}."""
    rows = [
        Answer(
            int(row["size"]),
            float(row["accuracy_alone"]),
            float(row["cost_alone"]),
            float(row["answers"]),
            None if row["threshold"] is None else float(row["threshold"]),
        )
        for row in told["sizes"]
    ]
    return Cascading(float(told["accuracy"]), float(told["cost"]), tuple(rows))


def _read(path: PathLike, made: Callable[[Mapping[str, Any]], Made], command: str) -> Made:
    try:
        return made(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} cannot be read as a table of trade-offs ({type(error).__name__}: {error}); "
            f"expected what this prints: {command}"
        ) from error
