"""What rotates, what is permuted, and why, on the whole zoo.

python -m tests.units.rotation_table [names ...] [--rows build/rotation.jsonl] [-o PAGE.md]

Rows are appended to the jsonl file as they come and are not measured again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import matryoshkafy as mk
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.rotate import rotate
from tests.units.rows import measured_rows
from tests.zoo.registry import Entry

HEAD = """# What rotates

`rotate` on every architecture of the zoo (a small random config, sizes 1/2 and 1, one batch): what
became of its main group, how many of its groups turned, how far the full model moved once its
outputs were put back (relative to the largest), and what stood in the way of the main group. The
others of its groups are permuted, or keep their order. Made by
`python -m tests.units.rotation_table -o PAGE`.

*rotated untied*: after `mk.untie(model)`, which gives a head that is its model's table a weight of
its own.
"""


@dataclass(frozen=True)
class Row:
    """One architecture: what its main group did, how many of its groups turned, how far the full
    model moved, what stood in the way.
    """

    name: str
    family: str
    done: str
    turned: int = 0
    error: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name:28} {self.done:14} {self.error:.0e} {self.why[:90]}"

    @property
    def reason(self) -> str:
        """The obstacle without the names of tensors."""
        words = ("." in word for word in self.why.split())
        kept = [w for w, named in zip(self.why.split(), words, strict=True) if not named]
        return " ".join(kept)


def measured(entry: Entry, *, untie: bool = False) -> Row:
    """Return the row of one architecture; one whose head is its table is tried untied, too."""
    model, args, kwargs = entry.build()
    if untie:
        mk.untie(model, args, kwargs)
    doll = mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting="sliced")
    torch.manual_seed(0)  # ViLT draws its patches
    before = doll(*args, **kwargs)
    report = rotate(doll, [(tuple(args), dict(kwargs))], unread="leave")
    torch.manual_seed(0)
    error = relative_error(report.put_back(doll, doll(*args, **kwargs)), before)
    main = doll.plan.groups[doll.plan.main].name
    why = dict(report.obstacles).get(main, "").partition(", at ")[0]
    if "(tied)" in why and not untie:
        other = measured(entry, untie=True)
        if other.done == "rotated":
            return replace(other, done="rotated untied")
    done = "rotated" if main in {row.name for row in report.rotated} else "permuted"
    return Row(entry.name, entry.family, done, len(report.rotated), error, why)


def _safely(entry: Entry) -> Row:
    """A crash of ours is a row of the table, not its end."""
    try:
        return measured(entry)
    except mk.MatryoshkafyError as error:
        return Row(entry.name, entry.family, "refused", why=str(error).splitlines()[0][:90])
    except Exception as error:  # noqa: BLE001  the table reports whatever went wrong
        why = f"{type(error).__name__}: {str(error)[:90]}"
        return Row(entry.name, entry.family, "broken", why=why)


def page(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield HEAD
    yield "| main group | architectures | worst error |\n|---|---|---|"
    for done, count in Counter(row.done for row in rows).most_common():
        worst = max(row.error for row in rows if row.done == done)
        yield f"| {done} | {count} | {worst:.0e} |"
    yield "\n| what stood in the way | architectures |\n|---|---|"
    for why, count in Counter(r.reason for r in rows if r.done == "permuted").most_common():
        yield f"| {why or 'nothing reads it as a vector'} | {count} |"
    yield "\n| architecture | library | main group | turned | error | why not |"
    yield "|---|---|---|---|---|---|"
    for r in sorted(rows, key=lambda r: (r.family, r.name)):
        yield f"| {r.name} | {r.family} | {r.done} | {r.turned} | {r.error:.0e} | {r.why} |"


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("build/rotation.jsonl"))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = measured_rows(options.names, options.rows, Row, _safely)
    if options.output:
        options.output.write_text("\n".join(page(rows)) + "\n")


if __name__ == "__main__":
    main()
