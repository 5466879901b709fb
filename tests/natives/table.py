"""Measure native sizes over the zoo and write docs/results/native.md.

    python -m tests.natives.table [names ...] [--rows ROWS.jsonl] [-o docs/results/native.md]

Half of every architecture that has a smaller configuration: found without a line per model, put
into its class, written to a folder and loaded again by its own library. Rows are appended as they
come and not measured again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import matryoshkafy as mk
from matryoshkafy.natives.native import Native, find
from matryoshkafy.natives.tree import named
from matryoshkafy.natives.writing import Package, write
from tests.natives.likes import like_of
from tests.zoo.plain import plain
from tests.zoo.registry import Entry, entries

MUST = """
    llama_gqa mistral qwen2 qwen3 gemma2 gemma3 phi3 gpt2 opt bert roberta distilbert modernbert t5
    bart whisper vit dinov2 clip siglip timm_vit timm_convnext timm_resnet timm_efficientnet
    open_clip
    """.split()


BESIDE = "<!-- measured beside the table -->\n"


def measure(entry: Entry) -> dict[str, Any]:
    """Return the row of an architecture: status, error, changed fields, seconds."""
    row: dict[str, Any] = {"name": entry.name, "family": entry.family}
    try:
        model, args, kwargs = entry.build()
        doll = _halved(model, args, kwargs)
        small = mk.slice(doll, doll.sizes[0])
    except mk.MatryoshkafyError as error:
        return {**row, "status": "no slice", "message": str(error).splitlines()[0][:200]}
    started = time.perf_counter()
    try:
        made = _found(small, like_of(entry, model), (args, kwargs))
    except mk.MatryoshkafyError as error:
        return {**row, "status": "refused", "message": str(error)[:300]}
    row |= {
        "status": "tables" if made.tables else "equal",
        "error": made.error,
        "fields": {named(field): value for field, value in made.changes.items()},
        "unread": list(made.unread),
        "tables": list(made.tables),
        "builds": len(made.recipe.memo),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return {**row, "written": _written(made, small)}


def _found(small: Any, like: Any, call: Any) -> Native:
    """Compare on random inputs, on the zoo's own with other floats where those do not run."""
    try:
        return find(small, like, tables=True)
    except mk.MatryoshkafyError as error:
        if "inputs=(ARGS" not in str(error):
            raise
    return find(small, like, tables=True, inputs=call)


def _halved(model: Any, args: Any, kwargs: Any) -> Any:
    """Convert without its checks: the class at the smaller configuration is the check here."""
    return mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting="sliced", check=False)


def _written(made: Any, small: Any) -> str:
    """Write the size and load it again by its library; the text of the error where that fails."""
    library = made.recipe.library
    plan = small.meta["matryoshka"][1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            write(Package(made, plan, None, {}, tables=True), Path(folder), library)
        except Exception as error:  # noqa: BLE001  the row says what went wrong
            return f"{library}: {type(error).__name__}: {str(error)[:160]}"
    return library


def main() -> None:
    """Parse the command line, measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("build/native.jsonl"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/native.md"))
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    text = options.rows.read_text() if options.rows.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    for entry in _chosen(options.names, {row["name"] for row in rows}):
        rows.append(_safely(entry))
        with options.rows.open("a") as sink:
            sink.write(json.dumps(rows[-1]) + "\n")
        print(entry.name, rows[-1]["status"], rows[-1].get("message", "")[:120], flush=True)
    options.output.write_text(page(rows) + _beside(options.output))


def _beside(path: Path) -> str:
    """Return what stands behind the table already: other measurements, which this one keeps."""
    text = path.read_text() if path.exists() else ""
    return f"\n{BESIDE}{text.partition(BESIDE)[2]}" if BESIDE in text else ""


def _chosen(names: list[str], known: set[str]) -> list[Entry]:
    rebuilt = [e for e in entries(names or None) if e.rebuild is not None and "large" not in e.tags]
    rebuilt.sort(key=lambda e: e.name not in MUST)
    return [e for e in rebuilt if e.name not in known]


def _safely(entry: Entry) -> dict[str, Any]:
    try:
        return measure(entry)
    except Exception as error:  # noqa: BLE001  a crash of ours is a row, not the end
        text = f"{type(error).__name__}: {str(error)[:160]}"
        return {"name": entry.name, "family": entry.family, "status": "broken", "message": text}


def page(rows: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    return "\n".join(
        [
            "# Native sizes",
            "",
            "Half of every architecture of the zoo that has a smaller configuration, in its own",
            "class: which fields shrink is found by building, no line is written per model.",
            "Made by `python -m tests.natives.table`, "
            f"torch {torch.__version__.split('+')[0]}, float32.",
            f"{len(rows)} of the {_total()} were measured, those that must pass first.",
            "Rows are kept from run to run, so they are of several states of the code of two days.",
            "",
            "| library | measured | equal to 1e-5 | with a table of the slice | refused | "
            "no slice, broken | loaded again from its folder |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *_summary(rows),
            "",
            "`equal`: the stock class at the smaller configuration computes what the slice",
            "does, on fresh inputs of two shapes. `table`: only after a hidden table that the",
            "class makes from its width was taken from the slice. `unread`: parameters that",
            "the traced path does not read and no comparison covers. `folder`: the library",
            "whose own loader gave the same values from the written folder.",
            "",
            "Where the only field is `ratio`, the architecture is built by a function of the",
            "zoo with this one number, as a user's own builder would; all others are found in",
            "the library's own configuration or arguments.",
            "",
            "| architecture | result | error | changed fields | unread | builds | folder |",
            "|---|---|---:|---|---:|---:|---|",
            *map(_line, sorted(rows, key=lambda r: (r["family"], r["name"]))),
            "",
        ]
    )


def _total() -> int:
    return sum(e.rebuild is not None for e in entries())


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for family in [*sorted({r["family"] for r in rows}), "all"]:
        mine = [r for r in rows if family in (r["family"], "all")]
        count = Counter(r["status"] for r in mine)
        good = sum(":" not in r.get("written", ":") for r in mine)
        rest = count["no slice"] + count["broken"]
        cells = (len(mine), count["equal"], count["tables"], count["refused"], rest, good)
        lines.append(f"| {family} | {' | '.join(map(str, cells))} |")
    return lines


def _line(row: dict[str, Any]) -> str:
    if row["status"] not in ("equal", "tables"):
        message = plain(row["message"])[:110]
        return f"| {row['name']} | {row['status']}: {message} | | | | | |"
    fields = ", ".join(f"`{name}` {value}" for name, value in list(row["fields"].items())[:6])
    fields += f" and {len(row['fields']) - 6} more" if len(row["fields"]) > 6 else ""
    result = "equal" if row["status"] == "equal" else f"table: {row['tables'][0]}"
    folder = row["written"].partition(":")[0] if ":" not in row["written"] else "refused"
    return (
        f"| {row['name']} | {result} | {row['error']:.0e} | {fields} | "
        f"{len(row['unread'])} | {row['builds']} | {folder} |"
    )


if __name__ == "__main__":
    main()
