"""The ladder of sizes, "64..1024": what the user writes, and a group's width at each size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Real
from typing import cast

from matryoshkafy.errors import MatryoshkafyError

Rungs = str | Sequence[int] | Sequence[float]  # as a person writes it
MAX_RUNGS = 4096
# A float such as 2/3 or 0.3 means the nearest fraction with a denominator up to this.
FINEST_RATIO = 1_000_000
HOW_TO_WRITE = (
    'Write a text ("64..1024" doubles, "64..768:64" steps by 64, "64,128,1024", "0.25,0.5,1"), '
    "a list of integers ([64, 128, 1024]) or a list of ratios ([0.25, 0.5, 1.0])."
)
RANGE = re.compile(r"(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})(?::(-?[0-9]{1,9}))?")
INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
RATIO = re.compile(r"[+-]?(?:[0-9]{1,9}\.[0-9]{0,18}|\.[0-9]{1,18}|[0-9]{1,9}/[0-9]{1,9})")


class SizesError(MatryoshkafyError):
    """A ladder that cannot be read, or that does not fit the model's width."""


@dataclass(frozen=True)
class Ladder:
    """A ladder as the user wrote it, read before the model's width is known.

    Args:
        given: the user's words.
        rungs: positive and strictly ascending; all of them int, or all of them Fraction in (0, 1].
    """

    given: str
    rungs: tuple[int, ...] | tuple[Fraction, ...]

    @property
    def relative(self) -> bool:
        """Tell whether the rungs are ratios of the width."""
        return isinstance(self.rungs[-1], Fraction)

    def at(self, width: int) -> tuple[int, ...]:
        """Return the sizes of a model of this width: ascending integers, the last is the width.

        Raises SizesError where the ladder ends elsewhere or two ratios give the same size.
        """
        scale = width if self.relative else 1
        sizes = tuple(max(1, math.ceil(rung * scale)) for rung in self.rungs)
        if sizes[-1] != width:
            raise SizesError(_misfit(self, sizes[-1], width))
        for (low, high), (size, after) in zip(pairwise(self.rungs), pairwise(sizes), strict=True):
            if size == after:
                raise SizesError(
                    f"sizes {self.given}: the ratios {low} and {high} both give {size} units of "
                    f"the model's width, {width}. Leave one of them out."
                )
        return sizes


def parse_sizes(sizes: Rungs, width: int) -> tuple[int, ...]:
    """Return the sizes that the user asks for: ascending integers, the last is the width.

    Args:
        sizes: a text that doubles ("64..1024", both ends included), steps ("64..768:64") or lists
            its rungs ("64,128,1024", "0.25,0.5,1"); or a list of integers, or of ratios in (0, 1],
            each of which gives ceil(ratio * width).
        width: of the model.

    Raises:
        SizesError: states the width, for anything else.
    """
    try:
        ladder = parse_ladder(sizes)
    except SizesError as error:
        raise SizesError(f"{error} The model's width is {width}.") from None
    return ladder.at(width)


def parse_ladder(sizes: str | Sequence[int] | Sequence[float]) -> Ladder:
    """Return the ladder of a text or list.

    Args:
        sizes: as `parse_sizes` takes them.

    Raises:
        SizesError: where no width could fit it.
    """
    given = _shown(sizes)
    rungs = _read_text(sizes, given) if isinstance(sizes, str) else _read_items(sizes, given)
    _check_rungs(rungs, given)
    return Ladder(given, rungs)


def one_size(given: float, width: int) -> int:
    """Return the size that a person means: an integer as it is, a ratio of the model's width.

    Raises SizesError for anything but an integer or a ratio in (0, 1].
    """
    text = _shown(given)
    rung = _read_item(given, text)
    _check_rungs((rung,), text)  # type: ignore[arg-type]
    return rung if isinstance(rung, int) else max(1, math.ceil(rung * width))


def width_at(n: int, size: int, width: int) -> int:
    """Return a group's width at a size: ceil(n * size / width), at least 1.

    Exact, for integers of any length.

    Args:
        n: the group's full width.
        size: the size.
        width: the main group's full width.
    """
    return max(1, -(-n * size // width))


def _shown(sizes: object) -> str:
    text = repr(sizes)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_text(text: str, given: str) -> tuple[int, ...] | tuple[Fraction, ...]:
    compact = re.sub(r"\s+", "", text)
    if not compact:
        raise SizesError(f"sizes {given} is empty: at least one size is expected. {HOW_TO_WRITE}")
    bounds = RANGE.fullmatch(compact)
    if bounds:
        first, last, step = (int(b) if b else None for b in bounds.groups())
        assert first is not None and last is not None
        return _range(first, last, step, given)
    parts = re.sub(r"\s*([,./:])\s*", r"\1", text.strip()).split(",")
    return _of_one_kind([_read_word(part, given) for part in parts], given)


def _range(first: int, last: int, step: int | None, given: str) -> tuple[int, ...]:
    if first < 1 or last < first or (step is not None and step < 1):
        raise SizesError(
            f"sizes {given}: a range START..END or START..END:STEP needs 1 <= START <= END and "
            f'a STEP of at least 1, such as "64..1024" or "64..768:64".'
        )
    if step and (last - first) // step >= MAX_RUNGS:
        raise SizesError(_too_many(given))
    rungs = range(first, last, step) if step else _doubling(first, last)
    return (*rungs, last)


def _doubling(first: int, last: int) -> list[int]:
    doublings = ((last - 1) // first).bit_length()
    return [first << k for k in range(doublings)]


def _read_word(word: str, given: str) -> int | Fraction:
    if INTEGER.fullmatch(word):
        return int(word)
    if RATIO.fullmatch(word) and not word.endswith("/" + "0" * len(word.rpartition("/")[2])):
        return Fraction(word)
    raise SizesError(f"sizes {given}: {_shown(word)} is neither a size nor a ratio. {HOW_TO_WRITE}")


def _read_items(items: object, given: str) -> tuple[int, ...] | tuple[Fraction, ...]:
    if not isinstance(items, Iterable) or isinstance(items, (bytes, Mapping, Set)):
        kind = type(cast("object", items)).__name__
        raise SizesError(
            f"sizes {given} is of type {kind}: a text or a list is expected. {HOW_TO_WRITE}"
        )
    listed = cast("Iterable[object]", items)
    return _of_one_kind([_read_item(item, given) for item in listed], given)


def _read_item(item: object, given: str) -> int | Fraction:
    number = None if isinstance(item, bool) else item
    if isinstance(number, Integral):
        return int(number)
    if isinstance(number, Fraction):
        return number
    if isinstance(number, Real) and math.isfinite(number):
        # A ratio too small for the grid keeps its sign, which the range check needs.
        return Fraction(float(number)).limit_denominator(FINEST_RATIO) or Fraction(float(number))
    raise SizesError(
        f"sizes {given}: {_shown(item)} is neither an integer nor a ratio in (0, 1]. {HOW_TO_WRITE}"
    )


def _of_one_kind(rungs: list[int | Fraction], given: str) -> tuple[int, ...] | tuple[Fraction, ...]:
    if not rungs:
        raise SizesError(f"sizes {given} is empty: at least one size is expected. {HOW_TO_WRITE}")
    if len(rungs) > MAX_RUNGS:
        raise SizesError(_too_many(given))
    integers = tuple(rung for rung in rungs if isinstance(rung, int))
    if len(integers) == len(rungs):
        return integers
    return tuple(Fraction(rung) for rung in rungs)


def _check_rungs(rungs: tuple[int, ...] | tuple[Fraction, ...], given: str) -> None:
    for rung in rungs:
        if rung <= 0:
            raise SizesError(f"sizes {given}: {rung} is not positive; every size must be.")
        if isinstance(rung, Fraction) and rung > 1:
            raise SizesError(
                f"sizes {given}: {float(rung):g} is above 1, but as ratios (numbers with a point) "
                f"every size must be in (0, 1]. Write widths as integers, without a point."
            )
    for low, high in pairwise(rungs):
        if low >= high:
            fault = "is repeated" if low == high else f"is followed by {high}"
            raise SizesError(f"sizes {given}: {low} {fault}; sizes must strictly ascend.")


def _misfit(ladder: Ladder, last: int, width: int) -> str:
    if ladder.relative:
        return (
            f"sizes {ladder.given} end at the ratio {ladder.rungs[-1]}, expected 1: the last size "
            f"is the model's width, {width}. Append 1."
        )
    remedy = f"leave out the sizes above {width}" if last > width else f"append {width}"
    where = "above" if last > width else "below"
    return (
        f"sizes {ladder.given} end at {last}, {where} the model's width, {width}, which the last "
        f"size must be: {remedy}, or end there."
    )


def _too_many(given: str) -> str:
    return f"sizes {given} name more than {MAX_RUNGS} sizes. Use a larger step, or fewer sizes."
