"""Measure the law of ordering on the whole zoo.

python -m tests.units.table [names ...] [--rows build/order.jsonl] [--double]

Rows are appended to the jsonl file as they come and are not measured again. With --double in
float64, which tells rounding from an error.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tests.units.laws import Row, measure
from tests.units.rows import measured_rows
from tests.zoo.registry import Entry


def main() -> None:
    """Parse the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("build/order.jsonl"))
    parser.add_argument("--double", action="store_true")
    options = parser.parse_args()
    safely = partial(_safely, double=options.double)
    measured_rows(options.names, options.rows, Row, safely)


def _safely(entry: Entry, *, double: bool) -> Row:
    """A crash of ours is a row of the table, not its end."""
    try:
        return measure(entry, double=double)
    except Exception as error:  # noqa: BLE001  the table reports whatever went wrong
        return Row(entry.name, "broken", f"{type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
