"""Solved terms: what a dimension is made of once it is known which groups nest.

A `Dim` is a row-major product of factors: an int (whole), a `Nested` (the width of a group), or a
`Sum` (dims laid one after the other). Everything else is derived from it: its size at a level, the
indices kept at a level, and the level of each index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from matryoshkafy.errors import MatryoshkafyError


@dataclass(frozen=True)
class Nested:
    """The width of group `group`; the group has `size` units at full width."""

    group: int
    size: int


@dataclass(frozen=True)
class Sum:
    """Dims laid one after the other."""

    segments: tuple[Dim, ...]


Factor = int | Nested | Sum
Dim = tuple[Factor, ...]
Widths = tuple[int, ...]
Segments = tuple[tuple[int, int], ...]


def size(dim: Dim) -> int:
    """Return the units of a dim at full width."""
    return size_at(dim, None)


def groups_of(dim: Dim) -> Iterator[int]:
    """Yield the groups that a dim depends on."""
    for factor in dim:
        if isinstance(factor, Nested):
            yield factor.group
        elif isinstance(factor, Sum):
            for part in factor.segments:
                yield from groups_of(part)


def is_nested(dim: Dim) -> bool:
    """Tell whether a dim shrinks with the size."""
    return next(groups_of(dim), None) is not None


def size_at(dim: Dim, widths: Widths | None) -> int:
    """Return the units of a dim where group g has widths[g] units; None: at full width."""
    return math.prod(_factor_size(factor, widths) for factor in dim)


def _factor_size(factor: Factor, widths: Widths | None) -> int:
    if isinstance(factor, Sum):
        return sum(size_at(part, widths) for part in factor.segments)
    if isinstance(factor, int):
        return factor
    return factor.size if widths is None else widths[factor.group]


@lru_cache(maxsize=65536)
def kept(dim: Dim, widths: Widths) -> Segments:
    """Return the indices kept at the given widths, as ascending (start, stop) segments."""
    segments: Segments = ((0, 1),)
    unit = 1
    for factor in reversed(dim):
        segments = _times(_factor_kept(factor, widths), segments, unit)
        unit *= _factor_size(factor, None)
    return segments


def _factor_kept(factor: Factor, widths: Widths) -> Segments:
    if isinstance(factor, int):
        return ((0, factor),)
    if isinstance(factor, Nested):
        return ((0, widths[factor.group]),)
    out: list[tuple[int, int]] = []
    offset = 0
    for part in factor.segments:
        out.extend((a + offset, b + offset) for a, b in kept(part, widths))
        offset += size(part)
    return merged(out)


def minus(segments: Segments, others: Segments) -> Segments:
    """Return what ascending segments hold beside others."""
    out: list[tuple[int, int]] = []
    for start, stop in segments:
        for a, b in others:
            if a < stop and b > start:
                out += [(start, a)] if start < a else []
                start = max(start, b)
        out += [(start, stop)] if start < stop else []
    return tuple(out)


def merged(segments: Iterable[tuple[int, int]]) -> Segments:
    """Return segments of which none ends where the next one starts."""
    out: list[tuple[int, int]] = []
    for a, b in segments:
        if out and out[-1][1] == a:
            out[-1] = (out[-1][0], b)
        elif b > a:
            out.append((a, b))
    return tuple(out)


def _times(outer: Segments, inner: Segments, unit: int) -> Segments:
    """Row-major product: every kept outer index holds the kept inner ones, `unit` apart."""
    # All of the inner units are kept: rows stay runs, however long, and need not be listed.
    if inner == ((0, unit),):
        return tuple((a * unit, b * unit) for a, b in outer)
    rows = (i * unit for a, b in outer for i in range(a, b))
    return merged([(row + a, row + b) for row in rows for a, b in inner])


def relative(dim: Dim, have: Widths, want: Widths) -> Segments | None:
    """Return the segments to keep of a dim that is already cut to `have`; None where all stays."""
    if not is_nested(dim) or size_at(dim, have) == size_at(dim, want):
        return None
    return within(kept(dim, want), kept(dim, have))


def within(segments: Segments, outer: Segments) -> Segments:
    """Return where segments of a dim lie among those of outer, which holds them all."""
    out: list[tuple[int, int]] = []
    offset = 0
    # Both are indices of the full dim; what is wanted is counted from the start of what is there.
    for start, stop in outer:
        found = ((max(a, start), min(b, stop)) for a, b in segments)
        out += [(a - start + offset, b - start + offset) for a, b in found if a < b]
        offset += stop - start
    return tuple(out)


@lru_cache(maxsize=65536)
def runs(dim: Dim, ladder: tuple[Widths, ...]) -> tuple[int, ...]:
    """Return (length, level, length, level, ...) along a dim: the first level that keeps each
    index.
    """
    levels: list[tuple[int, int]] = [(1, 0)]
    for factor in reversed(dim):
        levels = _run_product(_factor_runs(factor, ladder), levels)
    return tuple(v for run in levels for v in run)


def spans(dim: Dim, ladder: tuple[Widths, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, level) of the runs along a dim."""
    start = 0
    for length, level in _pairs(runs(dim, ladder)):
        yield start, start + length, level
        start += length


def _factor_runs(factor: Factor, ladder: tuple[Widths, ...]) -> list[tuple[int, int]]:
    if isinstance(factor, int):
        return [(factor, 0)]
    if isinstance(factor, Nested):
        ends = [0, *(w[factor.group] for w in ladder)]
        return [(b - a, i) for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) if b > a]
    return _joined(pair for p in factor.segments for pair in _pairs(runs(p, ladder)))


def _pairs(flat: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _joined(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for length, level in pairs:
        if out and out[-1][1] == level:
            out[-1] = (out[-1][0] + length, level)
        elif length:
            out.append((length, level))
    return out


def _run_product(
    outer: list[tuple[int, int]], inner: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Of a product at most the outermost nested factor has levels; the others repeat."""
    # A unit is there as soon as each of its factors is, so the higher of their levels counts.
    unit = sum(n for n, _ in inner)
    if len(inner) == 1:
        level = inner[0][1]
        return _joined((n * unit, max(k, level)) for n, k in outer)
    return _joined((n, max(k, j)) for count, k in outer for _ in range(count) for n, j in inner)


def to_json(dim: Dim) -> list[object]:
    """Return a dim as JSON: 12 is whole, "g3:64" nests, a list of dims is a Sum."""
    out: list[object] = []
    for factor in dim:
        if isinstance(factor, Sum):
            out.append([to_json(p) for p in factor.segments])
        else:
            out.append(factor if isinstance(factor, int) else f"g{factor.group}:{factor.size}")
    return out


def from_json(value: object, depth: int = 0) -> Dim:
    """Read what `to_json` wrote; anything else raises."""
    if not isinstance(value, list) or depth > 16:
        text = str(cast(object, value))
        raise MatryoshkafyError(f"{text[:60]!r} is no axis of a plan; the file is damaged")
    return tuple(_factor_from(v, depth) for v in cast("list[object]", value))


def _factor_from(value: object, depth: int) -> Factor:
    if isinstance(value, list):
        return Sum(tuple(from_json(v, depth + 1) for v in cast(list[object], value)))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    group, _, units = str(value).removeprefix("g").partition(":")
    if not (str(value).startswith("g") and group.isdecimal() and units.isdecimal()):
        raise MatryoshkafyError(f"{str(value)[:60]!r} is no factor of an axis; the file is damaged")
    return Nested(int(group), int(units))
