"""explained(), elsewhere(), undecided(): of what the line of a constant computes it.

What the line computes is read from the user's syntax (graph/formulas.py); the constant in the trace
then says what stood in the place of the name: sqrt(3 * d) = 9.798 means d = 32.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from matryoshkafy.axes import dims
from matryoshkafy.graph.formulas import OPAQUE, Formula

# An inverse power of what the trace holds as a float is that much farther off.
AMPLIFIED = 8


@dataclass(frozen=True)
class Explained:
    """A width that a constant was computed of: value = factor * width ** power + offset."""

    width: dims.Nested
    power: float
    offset: float


def explained(
    formulas: Collection[Formula],
    constant: tuple[float, float],
    widths: Collection[tuple[dims.Nested, int]],
) -> Explained | None:
    """Return how a constant was computed of a width; None where no formula says so.

    Args:
        formulas: of the line that holds the constant.
        constant: the number, and how far off its type may have made it.
        widths: which the constant may be of, and their units in full.
    """
    for formula in (f for f in formulas if f.known):
        for factor, width in widths:
            if _close(formula.leaf(constant[0]), width, constant):
                return Explained(factor, formula.leaves[0][1], formula.offset)
    return None


def elsewhere(
    formulas: Collection[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> bool:
    """Tell whether a line computes a constant, with a number of its own, of what is no size of any
    weight: sqrt(2 * layers), k / 32 in a loop.
    """
    own = [f for f in formulas if (f.coefficient != 1 or f.offset or f.counts_rounds)]
    found = [(f, f.leaf(constant[0])) for f in own if not f.opaque]
    whole = [n for _, n in found if n > 0.5 and math.isclose(n, round(n), rel_tol=constant[1])]
    leaves = [n for f, n in found if not f.counts_rounds]
    return bool(whole) and not any(_close(n, size, constant) for n in leaves for size in sizes)


def undecided(
    formulas: Collection[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> str:
    """Return of what a line may compute a constant: of a size that nests somewhere in the model, or
    of several names, or in a way that no formula says. "" where none is so.
    """
    for formula in formulas:
        leaf = formula.leaf(constant[0]) if formula.known else math.nan
        solved = any(_close(leaf, n, constant) for n in sizes)
        if solved or formula.opaque or (formula.known and len(formula.leaves) > 1):
            return ", ".join(name.removeprefix(OPAQUE) for name, _ in formula.leaves)
    return ""


def _close(leaf: float, size: int, constant: tuple[float, float]) -> bool:
    return math.isclose(leaf, size, rel_tol=AMPLIFIED * constant[1])
