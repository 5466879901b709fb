"""Tables as CSV, Markdown and text; curves as SVG; what a run was made with as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console
from rich.table import Table as RichTable

from examples.fmrlrec.config import Config, write_text
from examples.fmrlrec.evaluation import CUTOFFS, GAINS, PROTOCOLS, Table
from matryoshkafy.report import pictures
from matryoshkafy.report.page.numbers import stored
from matryoshkafy.report.pictures.svg import svg, text

METRICS = [f"{name}@{cutoff}" for name in GAINS for cutoff in CUTOFFS]
SHORT = ("NDCG@10", "Recall@10", "MRR@10", "NDCG@50", "Recall@50")
# How polars shows a table as Markdown, with all of its rows and columns.
SHOWN: dict[str, Any] = {
    "tbl_formatting": "ASCII_MARKDOWN",
    "tbl_rows": -1,
    "tbl_cols": -1,
    "tbl_width_chars": -1,
    "float_precision": 4,
    "tbl_hide_column_data_types": True,
    "tbl_hide_dataframe_shape": True,
    "fmt_str_lengths": 10_000,
}


def metric_table(found: Mapping[str, Table]) -> pl.DataFrame:
    """One row a size and protocol; every metric is a column."""
    return pl.DataFrame(
        {"size": name, "ranked": protocol, **{m: round(table[protocol][m], 6) for m in METRICS}}
        for name, table in found.items()
        for protocol in PROTOCOLS
    )


def write_table(table: pl.DataFrame, title: str, file: Path) -> None:
    """Writes `file`.csv and `file`.md, and prints the metrics that fit a terminal."""
    write_text(file.with_suffix(".csv"), table.write_csv())
    with pl.Config(**SHOWN):
        write_text(file.with_suffix(".md"), f"# {title}\n\n{table}\n")
    print_table(table.select(n for n in table.columns if n not in METRICS or n in SHORT), title)


def print_table(table: pl.DataFrame, title: str) -> None:
    """Prints the table as wide as the terminal is, which polars would leave."""
    drawn = RichTable(*table.columns, title=title, title_justify="left")
    for row in table.iter_rows():
        drawn.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    Console().print(drawn)


def print_files(paths: Iterable[Path]) -> None:
    """Prints files with their sizes."""
    for path in paths:
        if path.is_file():
            print(f"{path}  {stored(path.stat().st_size)}")


def plot(title: str, lines: Mapping[str, Mapping[int, float]], file: Path) -> None:
    """Draws {name: {size: value}} to `file`.svg, a line a name."""
    sizes = sorted({size for line in lines.values() for size in line})
    curves = pictures.lines(lines, sizes, title).replace("<svg ", '<svg y="30" height="170" ', 1)
    names = [
        text(name, 12, 222 + 16 * order, style=f"fill:{pictures.colour(order)}")
        for order, name in enumerate(lines)
    ]
    body = text(title, 12, 20, class_="title") + curves + "".join(names)
    drawing = svg(body, 360, 222 + 16 * len(lines), title)
    write_text(file.with_suffix(".svg"), pictures.standalone(drawing))


def write_environment(config: Config, folder: Path) -> None:
    """Writes `config.json`, and to `environment.json` versions, seed, machine and git revision."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": config.seed,
        "git": _revision(),
        "python": platform.python_version(),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu},
        "packages": {d.name: d.version for d in distributions()},
    }
    write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")
    write_text(folder / "environment.json", json.dumps(found, indent=2) + "\n")


def _revision() -> str | None:
    """The commit, with "-dirty" behind it where files differ; None outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
