"""Measure the law of ordering on the whole zoo.

python -m tests.units.table [names ...] [--rows build/order.jsonl]

Rows are appended to the jsonl file as they come and are not measured again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

from tests.units.laws import Row, measure
from tests.zoo.registry import Entry, entries


def main() -> None:
    """Parse the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("build/order.jsonl"))
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    known = {json.loads(line)["name"] for line in lines}
    for entry in entries(options.names or None):
        if entry.name not in known and "large" not in entry.tags:
            row = _safely(entry)
            with options.rows.open("a") as sink:
                sink.write(json.dumps(asdict(row)) + "\n")
            print(
                f"{row.name:28} {row.status:8} output {row.output:.0e} gradient {row.gradient:.0e} "
                f"groups {row.groups} kept {len(row.kept)} {row.message[:90]}",
                flush=True,
            )


def _safely(entry: Entry) -> Row:
    """A crash of ours is a row of the table, not its end."""
    try:
        return measure(entry)
    except Exception as error:  # noqa: BLE001  the table reports whatever went wrong
        return Row(entry.name, "broken", f"{type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
