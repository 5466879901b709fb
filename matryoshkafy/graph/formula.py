"""Formula: a number as a product of names, and its arithmetic.

math.sqrt(3 * d) is (3 * d) ** 0.5: with the number that the trace holds, it tells what d was.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field, replace

ROUND, OPAQUE = "round of ", "value of "
HALVES = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Formula:
    """coefficient * leaf ** power * ... + offset.

    Args:
        coefficient: what stands before the leaves; the number, where there are none.
        leaves: {the text of what is not known: its power}; none: a number.
        offset: what is added.
        counts: whether a leaf asks a tensor for its sizes, or a list for its length.
    """

    coefficient: float
    leaves: tuple[tuple[str, float], ...] = ()
    offset: float = 0.0
    counts: bool = field(default=False, compare=False)

    @property
    def plain(self) -> bool:
        """A number, or a name as such: says nothing of a number that is equal to it."""
        bare = (self.coefficient, self.offset) == (1.0, 0.0) and len(self.leaves) == 1
        named = bare and self.leaves[0][1] == 1.0 and not self.counts
        return not self.leaves or (named and not self.opaque)

    @property
    def known(self) -> bool:
        """Whether every leaf may be a width: none counts rounds or is computed unseen."""
        return not self.opaque and not self.counts_rounds

    @property
    def counts_rounds(self) -> bool:
        """Whether a leaf is a round of a loop, or the length of a list."""
        return any(name.startswith(ROUND) for name, _ in self.leaves)

    @property
    def opaque(self) -> bool:
        """Whether a leaf is computed of names in a way that no formula says."""
        return any(name.startswith(OPAQUE) for name, _ in self.leaves)

    def leaf(self, value: float) -> float:
        """Return what the one leaf is where the formula is `value`; NaN of several leaves."""
        ratio = (value - self.offset) / self.coefficient if self.coefficient else 0.0
        if len(self.leaves) != 1 or ratio <= 0:
            return math.nan
        try:
            return ratio ** (1 / self.leaves[0][1])
        except OverflowError:
            return math.nan


def combined(op: ast.operator, left: Formula, right: Formula) -> Formula | None:
    """Return left op right, None where that is no formula: a sum of two names, a part rounded."""
    if isinstance(op, ast.Mult):
        return product_of(left, right)
    if isinstance(op, ast.FloorDiv) and (right.leaves or right.coefficient not in HALVES):
        return None  # what is left over is another part of every width
    if isinstance(op, (ast.Div, ast.FloorDiv)):
        inverse = power_of(right, -1.0)
        return None if inverse is None else product_of(left, inverse)
    if isinstance(op, ast.Pow):
        return None if right.leaves else power_of(left, right.coefficient)
    if isinstance(op, ast.Sub):
        return sum_of(left, product_of(right, Formula(-1.0)))
    return sum_of(left, right) if isinstance(op, ast.Add) else None


def sum_of(left: Formula, right: Formula | None) -> Formula | None:
    """Return left + right, None where both hold names."""
    if right is None or (left.leaves and right.leaves):
        return None
    if not left.leaves and not right.leaves:
        return Formula(left.coefficient + right.coefficient)
    of, number = (left, right) if left.leaves else (right, left)
    return replace(of, offset=of.offset + number.coefficient)


def product_of(left: Formula, right: Formula) -> Formula | None:
    """Return left * right, None of sums of names."""
    if left.leaves and right.leaves and (left.offset or right.offset):
        return None
    if not right.leaves:
        left, right = right, left
    if not left.leaves:  # a number times anything
        number = left.coefficient
        return replace(right, coefficient=right.coefficient * number, offset=right.offset * number)
    powers = dict(left.leaves)
    for name, power in right.leaves:
        powers[name] = powers.get(name, 0.0) + power
    leaves = tuple((name, power) for name, power in powers.items() if power)
    return Formula(left.coefficient * right.coefficient, leaves, counts=left.counts or right.counts)


def power_of(of: Formula, exponent: float) -> Formula | None:
    """Return of ** exponent, None of a sum of a name and of what has no real power."""
    if of.leaves and of.offset:
        return None
    if exponent == 0:
        return Formula(1.0)
    if of.coefficient <= 0 or abs(exponent) > 4:
        return None
    leaves = tuple((name, p * exponent) for name, p in of.leaves)
    return Formula(of.coefficient**exponent, leaves, counts=of.counts)
