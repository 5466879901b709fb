"""The algebra of axes: what a tensor dimension is made of.

A *term* describes one dimension as a row-major product of factors. A factor is an `Axis` (an
identity with a size) or a `Sum` (segments laid one after the other); the empty product is a
dimension of size 1, which carries no information.

    term   := (factor, ...)            packed qkv: (Axis(3), Axis(12), Axis(64))
    factor := Axis | Sum(term, ...)    gate|up:    (Sum((ffn,), (ffn,)),) = (copies of 2, ffn)

Two axes are one only if they are the same object: equal sizes are a coincidence. `unify` makes two
terms one, from the right, splitting the larger axis where the factors of the smaller one ask for
it. What cannot be aligned is held fixed on both sides, with the reason, and never guessed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why an axis stays whole: a word of the plan's vocabulary, and the place that asked for it."""

    kind: str
    place: str = ""


COPIES = Reason("copies")


class Axis:
    """An identity that a tensor dimension carries; mutable only through the functions below.

    Of two axes that become one the elder keeps its name: `births` counts the axes of one walk, and
    the parts of an axis are counted with it.
    """

    __slots__ = ("size", "name", "fixed", "bound", "births", "serial")

    def __init__(
        self,
        size: int,
        name: str = "",
        fixed: Reason | None = None,
        births: Iterator[int] | None = None,
    ) -> None:
        self.size = size
        self.name = name
        self.fixed = fixed
        self.bound: Term | None = None
        self.births = itertools.count() if births is None else births
        self.serial = next(self.births)

    def part(self, size: int, name: str = "") -> Axis:
        """Return a new axis that stands for some of the units, held where this one is."""
        return Axis(size, name or self.name, self.fixed, self.births)

    def __repr__(self) -> str:
        return f"{self.name or 'axis'}:{self.size}{'!' if self.fixed else ''}"


class Copies(Axis):
    """Interchangeable repetitions: those of one number are one axis, whoever asks for them."""

    __slots__ = ()

    def __init__(self, size: int) -> None:
        super().__init__(size, "copies", COPIES)
        self.serial = -size  # elder than any axis: what meets copies becomes copies

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Copies) and other.size == self.size

    def __hash__(self) -> int:
        return hash((Copies, self.size))


class Sum:
    """Segments laid one after the other along one dimension."""

    __slots__ = ("segments", "size")

    def __init__(self, segments: Iterable[Term]) -> None:
        self.segments = tuple(segments)
        self.size = sum(size(s) for s in self.segments)

    def __repr__(self) -> str:
        return f"Sum{self.segments}"


Factor = Axis | Sum
Term = tuple[Factor, ...]


def copies(n: int) -> Term:
    """Return the term of n interchangeable repetitions (the 3 of a packed qkv): never nested."""
    return () if n == 1 else (Copies(n),)


def size(term: Term) -> int:
    """Return the number of units of a term at full width."""
    return math.prod(f.size for f in term)


def resolve(term: Term) -> Term:
    """Return the term with every bound axis replaced by what it stands for, normalised."""
    if all(isinstance(f, Axis) and f.bound is None and f.size != 1 for f in term):
        return term
    out: list[Factor] = []
    for factor in term:
        if isinstance(factor, Sum):
            out.extend(_normal_sum(factor.segments))
        elif factor.bound is not None:
            factor.bound = resolve(factor.bound)
            out.extend(factor.bound)
        elif factor.size != 1:
            out.append(factor)
    return tuple(out)


def _normal_sum(segments: Iterable[Term]) -> Term:
    flat: list[Term] = []
    for segment in map(resolve, segments):
        if len(segment) == 1 and isinstance(segment[0], Sum):
            flat.extend(segment[0].segments)
        elif size(segment):
            flat.append(segment)
    if not flat:
        return (Axis(0, "empty", COPIES),)
    if len(flat) == 1:
        return flat[0]
    # In one form only: two sums that mean the same must compare equal factor by factor.
    common = _common_suffix(flat)
    rest = [s[: len(s) - len(common)] for s in flat]
    if all(not r for r in rest):
        return (*copies(len(rest)), *common)
    return (Sum(rest), *common)


def _common_suffix(segments: list[Term]) -> Term:
    """Sum[a.k, b.k] = Sum[a, b].k, and n equal pieces = copies(n).x"""
    count = 0
    shortest = min(len(s) for s in segments)
    while count < shortest and all(s[-1 - count] == segments[0][-1 - count] for s in segments):
        count += 1
    return segments[0][len(segments[0]) - count :]


def leaves(*terms: Term) -> Iterator[Axis]:
    """Yield every axis of terms, resolved."""
    for factor in (factor for term in terms for factor in resolve(term)):
        if isinstance(factor, Axis):
            yield factor
        else:
            yield from leaves(*factor.segments)


def fix(term: Term, reason: Reason) -> None:
    """Hold every axis of the term at its full size."""
    for axis in leaves(term):
        if axis.fixed is None:
            axis.fixed = reason


def is_fixed(term: Term) -> bool:
    """Tell whether nothing of the term can shrink."""
    return all(axis.fixed for axis in leaves(term))
