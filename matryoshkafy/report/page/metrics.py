"""read_metrics(): what each size achieves, out of a CSV file."""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matryoshkafy.report.page.contents import ReportError, Series


def read_metrics(path: str | os.PathLike[str], sizes: Sequence[int]) -> dict[str, Series]:
    """Read a CSV with a column `size` and one column a metric: {metric: {series: {size: value}}}.

    Args:
        path: the file. Columns of words name the series (a protocol, a data set).
        sizes: those that are shown; rows of others are left out.

    Raises:
        ReportError: a file without the column, without any of the sizes, or with two values for one
            place.
    """
    rows = _rows_of(Path(path))
    rows = [row for row in rows if row["size"] in {str(s) for s in sizes}]
    if not rows:
        raise ReportError(
            f"{path} has no row for any of the sizes {list(sizes)}; "
            "its column `size` should name them"
        )
    named = [c for c in rows[0] if c != "size"]
    numeric = [c for c in named if all(_is_number(row[c]) for row in rows)]
    metrics: dict[str, dict[str, dict[int, float]]] = {name: defaultdict(dict) for name in numeric}
    for row in rows:
        series = ", ".join(row[c] for c in named if c not in numeric)
        _place(metrics, series, row, str(path))
    return {name: _ascending(series) for name, series in metrics.items()}


def _rows_of(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(
            f"the metrics {path} cannot be read ({error}); give a CSV file"
        ) from error
    reader = csv.DictReader(text.splitlines(), restval="")
    if "size" not in (reader.fieldnames or ()):
        raise ReportError(
            f"{path} has the columns {list(reader.fieldnames or ())}; expected one called `size` "
            "and one for each metric"
        )
    return [{k: v for k, v in row.items() if k is not None} for row in reader]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _place(
    metrics: Mapping[str, dict[str, dict[int, float]]],
    series: str,
    row: Mapping[str, str],
    path: str,
) -> None:
    size = int(row["size"])
    for name, placed in metrics.items():
        if size in placed[series]:
            raise ReportError(
                f"{path} has two values of {name} for size {size} {series}; leave one, or add a "
                "column of words that tells them apart"
            )
        placed[series][size] = float(row[name])


def _ascending(series: Series) -> dict[str, dict[int, float]]:
    return {name: dict(sorted(line.items())) for name, line in series.items()}
