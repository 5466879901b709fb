"""Measure the laws on the zoo and write docs/results/zoo.md.

    python -m tests.zoo.table [names ...] [--rows rows.jsonl] [-o docs/results/zoo.md]

Rows are appended to the jsonl file as they come and are not measured again, so a run can be stopped
and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.zoo.laws import Row, measure
from tests.zoo.registry import Entry, entries
from tests.zoo.required import REQUIRED


def main() -> None:
    """Parse the command line, measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("build/zoo.jsonl"))
    parser.add_argument("--skip", default="large", help="leave out entries with this tag")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/zoo.md"))
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    chosen = [e for e in entries(options.names or None) if options.skip not in e.tags]
    warnings.simplefilter("ignore")
    rows = _measured(chosen, options.rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(rows))


def _measured(chosen: Iterable[Entry], path: Path) -> list[dict[str, Any]]:
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = {row["name"] for row in known}
    for entry in chosen:
        if entry.name in names:
            continue
        rows = _safely(entry)
        with path.open("a") as sink:
            sink.writelines(json.dumps(r.as_json()) + "\n" for r in rows)
        known += [r.as_json() for r in rows]
        print(
            *(f"{r.name} {r.nesting} {r.status} {r.message[:90]}" for r in rows),
            sep="\n",
            flush=True,
        )
    return known


def _safely(entry: Entry) -> list[Row]:
    """A crash of ours is a row of the table, not its end."""
    try:
        return measure(entry)
    except Exception as error:  # noqa: BLE001  the table reports whatever went wrong
        text = f"{type(error).__name__}: {str(error)[:120]}"
        return [Row(entry.name, entry.family, n, "broken", text) for n in ("sliced", "masked")]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    lines = [
        "# The zoo",
        "",
        "Every architecture from a small random config, ratios 1/4, 1/2, 1. Made by",
        "`python -m tests.zoo.table` on a 2-core CPU machine, "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}.",
        "",
        "<!-- readme -->",
        *_summary(rows),
        "<!-- /readme -->",
        "",
        "`identity`: full size against the user's model. `laws`: worst of outputs, trunk nodes and",
        "noise past the prefix. `native`: the half-size slice in the same class built from the",
        "smaller config (inf: the shapes differ; blank: no such config). `half`: parameters left.",
        "Where `native` is large, the class makes a table from its width anew (sinusoids, rotary",
        "frequencies) that the slice cuts out of the big one's, or derives a constant from the",
        "width in a way of its own: the slice is the prefix of the big model, as `laws` says, and",
        "not that class. Architectures in bold are measured on every change by the test suite.",
        "",
        "## By library",
        "",
        *_by_library(rows),
        "",
        "## Every architecture",
        "",
        "| architecture | library | nesting | status | identity | laws | native | half | tail |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            _line(r)
            for r in sorted(rows, key=lambda r: (r["name"] not in REQUIRED, r["family"], r["name"]))
        ),
    ]
    return "\n".join(lines) + "\n"


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    out = ["| what | sliced | masked |", "|---|---|---|"]
    for title, test in COUNTS:
        cells = []
        for nesting in ("sliced", "masked"):
            mine = [r for r in rows if r["nesting"] == nesting]
            cells.append(f"{sum(map(test, mine))} of {len(mine)}")
        out.append(f"| {title} | {' | '.join(cells)} |")
    return out


def _by_library(rows: list[dict[str, Any]]) -> list[str]:
    """Return a row per library: how many keep the laws, and how near they come to their class."""
    head = (
        "| library | architectures | laws, sliced | laws, masked | equal native | half, median | "
        "half, worst |"
    )
    out = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for family in sorted({r["family"] for r in rows}):
        mine = [r for r in rows if r["family"] == family]
        sliced, masked = ([r for r in mine if r["nesting"] == n] for n in ("sliced", "masked"))
        known = [r for r in sliced if r["native"] is not None]
        halves = sorted(r["half"] for r in mine if r["status"] == "ok")
        cells = (
            len(sliced),
            _share([r["status"] == "ok" for r in sliced]),
            _share([r["status"] == "ok" for r in masked]),
            _share([r["native"] <= 1e-5 for r in known]),
            *(f"{halves[at]:.2f}" if halves else "" for at in (len(halves) // 2, -1)),
        )
        out.append(f"| {family} | {' | '.join(map(str, cells))} |")
    return out


def _share(held: list[bool]) -> str:
    return f"{sum(held)} of {len(held)}" if held else ""


COUNTS = (
    ("every law holds", lambda r: r["status"] == "ok"),
    (
        "at half size at most half of all parameters",
        lambda r: r["status"] == "ok" and r["half"] <= 0.5,
    ),
    ("tail at most 20 % of the nodes", lambda r: r["status"] == "ok" and r["tail"] <= 0.2),
    ("both of these", lambda r: r["status"] == "ok" and r["half"] <= 0.5 and r["tail"] <= 0.2),
    (
        "equals the native small model to 1e-5",
        lambda r: r["native"] is not None and r["native"] <= 1e-5,
    ),
    ("has a native small model", lambda r: r["native"] is not None),
    ("refused by name", lambda r: r["status"] == "refused"),
    ("broken", lambda r: r["status"] == "broken"),
)


def _line(r: dict[str, Any]) -> str:
    mark = "**" if r["name"] in REQUIRED else ""
    native = "" if r["native"] is None else f"{r['native']:.0e}"
    message = r["message"].replace("|", "/")[:100]
    head = f"| {mark}{r['name']}{mark} | {r['family']} | {r['nesting']} | {r['status']}"
    if r["status"] != "ok" and message:
        return f"{head}: {message} | | | | | |"
    errors = f"{r['identity']:.0e} | {r['laws']:.0e} | {native}"
    return f"{head} | {errors} | {r['half']:.2f} | {r['tail']:.2f} |"


if __name__ == "__main__":
    main()
