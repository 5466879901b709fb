"""Tables as CSV, Markdown and text; curves as PNG and SVG; what a run was made with as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table as RichTable

from examples.fmrlrec.config import Config, write_text
from examples.fmrlrec.evaluation import CUTOFFS, GAINS, PROTOCOLS, Table

METRICS = [f"{name}@{cutoff}" for name in GAINS for cutoff in CUTOFFS]
SHORT = ("NDCG@10", "Recall@10", "MRR@10", "NDCG@50", "Recall@50")
MARKDOWN = {
    "tbl_formatting": "MARKDOWN", "tbl_hide_dataframe_shape": True, "float_precision": 4,
    "tbl_hide_column_data_types": True, "tbl_rows": -1, "tbl_cols": -1, "tbl_width_chars": 1000,
}  # fmt: skip


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
    with pl.Config(**MARKDOWN):
        write_text(file.with_suffix(".md"), f"# {title}\n\n{table}\n")
    print_table(table.select(n for n in table.columns if n not in METRICS or n in SHORT), title)


def print_table(table: pl.DataFrame, title: str) -> None:
    """Prints the table to the terminal."""
    drawn = RichTable(*table.columns, title=title, title_justify="left")
    for row in table.iter_rows():
        drawn.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    Console().print(drawn)


def print_files(paths: Iterable[Path]) -> None:
    """Prints files with their sizes."""
    from matryoshkafy.report.page.numbers import stored

    for path in paths:
        if path.is_file():
            print(f"{path}  {stored(path.stat().st_size)}")


def plot(title: str, value: str, lines: Mapping[str, Mapping[float, float]], file: Path) -> None:
    """Draws {name: {size: value}} over sizes (logarithmic) to `file`.png and .svg.

    A line of one point is a floor for all sizes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, line in lines.items():
        if len(line) > 1:
            axes.plot(list(line), list(line.values()), "o-", label=label)
        else:
            axes.axhline(*line.values(), linestyle="--", label=label)
    sizes = sorted({size for line in lines.values() for size in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set(title=title, xlabel="size", ylabel=value)
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(file.with_suffix(suffix), dpi=150)
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
    write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")
    write_text(folder / "environment.json", json.dumps(found, indent=2) + "\n")


def _git(*words: str) -> str | None:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
