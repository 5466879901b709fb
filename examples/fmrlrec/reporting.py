"""Tables as CSV, Markdown and text; curves as PNG and SVG; what a run was made with as JSON."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from examples.fmrlrec.config import Config, write_text
from examples.fmrlrec.evaluation import CUTOFFS, GAINS, PROTOCOLS, Table

METRICS = tuple(f"{name}@{cutoff}" for name in GAINS for cutoff in CUTOFFS)
SHORT = ("NDCG@10", "Recall@10", "MRR@10", "NDCG@50", "Recall@50")


@dataclass(frozen=True)
class Sheet:
    """A table with a title, the names of its columns and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Curves:
    """Named lines over sizes: {name: {size: value}}, with the words for the plot."""

    title: str
    value: str
    lines: Mapping[str, Mapping[float, float]]


def metric_sheet(title: str, found: Mapping[str, Table], first: str = "size") -> Sheet:
    """One row a size and protocol; every metric is a column."""
    rows = tuple(
        (name, protocol, *(round(table[protocol][metric], 6) for metric in METRICS))
        for name, table in found.items()
        for protocol in PROTOCOLS
    )
    return Sheet(title, (first, "ranked", *METRICS), rows)


def shortened(sheet: Sheet) -> Sheet:
    """The same table with the metrics that fit a terminal."""
    kept = [i for i, name in enumerate(sheet.columns) if name not in METRICS or name in SHORT]
    rows = tuple(tuple(row[i] for i in kept) for row in sheet.rows)
    return Sheet(sheet.title, tuple(sheet.columns[i] for i in kept), rows)


def write_sheet(sheet: Sheet, folder: Path, name: str) -> None:
    """Writes `name`.csv and `name`.md and prints the short form."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([sheet.columns, *sheet.rows])
    write_text(folder / f"{name}.csv", text.getvalue())
    write_text(folder / f"{name}.md", f"# {sheet.title}\n\n{markdown(sheet)}\n")
    print_sheet(shortened(sheet))


def markdown(sheet: Sheet) -> str:
    """The table in GitHub's Markdown."""
    lines = [sheet.columns, ("---",) * len(sheet.columns), *sheet.rows]
    return "\n".join("| " + " | ".join(_text(v) for v in line) + " |" for line in lines)


def print_sheet(sheet: Sheet) -> None:
    """Prints the table to the terminal."""
    table = RichTable(*sheet.columns, title=sheet.title, title_justify="left")
    for row in sheet.rows:
        table.add_row(*map(_text, row))
    Console().print(table)


def print_files(paths: Iterable[Path]) -> None:
    """Prints files with their sizes."""
    from matryoshkafy.report.page.numbers import stored

    for path in paths:
        if path.is_file():
            print(f"{path}  {stored(path.stat().st_size)}")


def plot(curves: Curves, folder: Path, name: str) -> None:
    """Draws the lines over sizes (logarithmic) to `name`.png and `name`.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, line in curves.lines.items():
        style = "--" if len(line) == 1 else "o-"
        axes.plot(*_drawn(line, curves), style, label=label)
    axes.set_xscale("log", base=2)
    sizes = sorted({size for line in curves.lines.values() for size in line})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set(title=curves.title, xlabel="size", ylabel=curves.value)
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)
    pyplot.close(figure)


def write_environment(config: Config, folder: Path) -> None:
    """Writes `config.json`, and to `environment.json` versions, seed, machine and git revision."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": config.seed,
        "git": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu},
        "packages": {d.name: d.version for d in distributions()},
    }
    write_text(folder / "config.json", config.to_json() + "\n")
    write_text(folder / "environment.json", json.dumps(found, indent=2) + "\n")


def _drawn(line: Mapping[float, float], curves: Curves) -> tuple[Sequence[float], Sequence[float]]:
    if len(line) > 1:
        return list(line), list(line.values())
    sizes = [size for other in curves.lines.values() for size in other]
    return [min(sizes), max(sizes)], list(line.values()) * 2


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _git(*words: str) -> str | None:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
