"""folded(): rows whose names differ in a number alone become one row, `layers.0-31.mlp`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

Row = tuple[str, ...]
Numbers = frozenset[int]
# A name taken apart: text, number, text, ...; a number is the set of those that it stands for.
Part = str | Numbers
Parts = tuple[Part, ...]
Split = tuple[Parts, Row]
# A number with a leading zero is a word: "01" is no 1.
NUMBER = re.compile(r"((?<!\d)(?:0|[1-9]\d*)(?!\d))")
ALL = frozenset({-1})


def folded(rows: Iterable[Row], names: Collection[str] = ()) -> list[Row]:
    """Return the rows, those that differ in one number of their name alone as one: `layers.0-31`.

    Args:
        rows: (name, cells that are equal in the rows that are folded).
        names: all names of the model. Where they are given, stages of unequal depth fold, too:
            `layer1-4.*` says that every block of the four is meant.
    """
    split = [(_parts(name), tuple(cells)) for name, *cells in rows]
    for at in reversed(range(max((len(parts) for parts, _ in split), default=0))):
        split = _folded_at(split, at)
    known = _numbers_after([_parts(name) for name in names])
    for at in range(max((len(parts) for parts, _ in split), default=0)):
        split = _stages_folded_at(split, at, known)
    return [("".join(map(_written, parts)), *cells) for parts, cells in split]


def _parts(name: str) -> Parts:
    return tuple(
        frozenset({int(part)}) if place % 2 else part
        for place, part in enumerate(NUMBER.split(name))
    )


def _folded_at(rows: list[Split], at: int) -> list[Split]:
    """Fold the rows that differ in part `at` of the name, a number, and nowhere else."""
    out: list[Split] = []
    for group in _alike(rows, (at,)):
        numbers = [parts[at] for parts, _ in group if at < len(parts)]
        if len(group) == 1 or len(set(numbers)) == 1:
            out.extend(group)
        else:
            out.append(_with(group[0], at, _union(numbers)))
    return out


def _stages_folded_at(rows: list[Split], at: int, known: Mapping[Parts, Numbers]) -> list[Split]:
    """Fold the rows that differ in the number `at` and in how far the next numbers count."""
    for later in range(at + 2, max((len(parts) for parts, _ in rows), default=0), 2):
        out: list[Split] = []
        for group in _alike(rows, (at, later)):
            if len(group) == 1 or not all(_is_all(parts, later, known) for parts, _ in group):
                out.extend(group)
            else:
                stages = _with(group[0], at, _union(parts[at] for parts, _ in group))
                out.append(_with(stages, later, ALL))
        rows = out
    return rows


def _alike(rows: list[Split], places: tuple[int, ...]) -> Iterator[list[Split]]:
    """Yield the rows in groups that are equal but for the numbers at these places."""
    same: dict[object, list[Split]] = {}
    for number, (parts, cells) in enumerate(rows):
        fits = all(p < len(parts) and isinstance(parts[p], frozenset) for p in places)
        rest = tuple(None if p in places else part for p, part in enumerate(parts))
        same.setdefault((rest, cells) if fits else number, []).append((parts, cells))
    yield from same.values()


def _with(row: Split, at: int, numbers: Numbers) -> Split:
    parts, cells = row
    return (*parts[:at], numbers, *parts[at + 1 :]), cells


def _union(numbers: Iterable[Part]) -> Numbers:
    return frozenset(n for part in numbers if isinstance(part, frozenset) for n in part)


def _numbers_after(names: Iterable[Parts]) -> dict[Parts, Numbers]:
    """Return the numbers that occur in the model after each beginning of a name."""
    known: dict[Parts, Numbers] = {}
    for parts in names:
        for at in range(1, len(parts), 2):
            known[parts[:at]] = known.get(parts[:at], frozenset()) | _union(parts[at : at + 1])
    return known


def _is_all(parts: Parts, at: int, known: Mapping[Parts, Numbers]) -> bool:
    """Tell whether the numbers at a place are all that the model has there."""
    choices = [
        [frozenset({n}) for n in sorted(part)] if isinstance(part, frozenset) else [part]
        for part in parts[:at]
    ]
    return all(known.get(begin) == parts[at] for begin in itertools.product(*choices))


def _written(part: Part) -> str:
    if isinstance(part, str):
        return part
    return "*" if part == ALL else ",".join(_ranges(sorted(part)))


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Yield "0-3", "7" for 0, 1, 2, 3, 7."""
    start = last = numbers[0]
    for number in [*numbers[1:], -1]:
        if number != last + 1:
            yield str(start) if start == last else f"{start}-{last}"
            start = number
        last = number
