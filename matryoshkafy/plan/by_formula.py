"""explained(), elsewhere(), undecided(): of what the line of a constant computes it.

What the line computes is read from the user's syntax (graph/formulas.py); the constant in the trace
then says what stood in the place of the name: sqrt(3 * d) = 9.798 means d = 32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
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
    sizes: Collection[int],
) -> Explained | None:
    """Return how a constant was computed of a width; None where no formula says so.

    Args:
        formulas: of the line that holds the constant.
        constant: the number, and how far off its type may have made it.
        widths: which the constant may be of, and their units in full.
        sizes: what else a formula may count: sqrt(d) * length.
    """
    for formula in (f for f in formulas if f.known):
        for power, leaf in _leaves(formula, constant[0], sizes):
            for factor, width in widths:
                if math.isclose(leaf, width, rel_tol=AMPLIFIED * constant[1]):
                    return Explained(factor, power, formula.offset)
    return None


def elsewhere(
    formulas: Collection[Formula],
    constant: tuple[float, float],
    widths: Collection[tuple[dims.Nested, int]],
) -> bool:
    """Tell whether a line computes a constant, with a number of its own, of what is no width:
    sqrt(2 * layers), k / 32 in a loop.
    """
    single = [f for f in formulas if len(f.leaves) == 1 and (f.coefficient != 1 or f.offset)]
    single = [f for f in single if not f.leaves[0][0].startswith(OPAQUE)]
    leaves = [leaf for f in single for _, leaf in _leaves(f, constant[0], ())]
    whole = [n for n in leaves if n > 0.5 and math.isclose(n, round(n), rel_tol=constant[1])]
    return bool(whole) and explained(formulas, constant, widths, ()) is None


def undecided(
    formulas: Collection[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> str:
    """Return of what a line may compute a constant: of a size that nests somewhere in the model, or
    in a way that no formula says. "" where neither is so.
    """
    for formula in formulas:
        names = ", ".join(name.removeprefix(OPAQUE) for name, _ in formula.leaves)
        if any(name.startswith(OPAQUE) for name, _ in formula.leaves):
            return names
        leaves = [leaf for _, leaf in _leaves(formula, constant[0], ())] if formula.known else []
        if any(math.isclose(x, n, rel_tol=AMPLIFIED * constant[1]) for x in leaves for n in sizes):
            return names
    return ""


def _leaves(
    formula: Formula, value: float, sizes: Collection[int]
) -> Iterator[tuple[float, float]]:
    """Yield the power of each name, and what it was where the formula is the value."""
    for name, power in formula.leaves:
        others = [other for other, _ in formula.leaves if other != name]
        if not others:
            yield power, formula.leaf(value)
        elif len(others) == 1 and others[0] in formula.counts:
            yield from ((power, formula.leaf(value, {others[0]: n})) for n in sizes)
