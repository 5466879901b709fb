"""explained(), elsewhere(), undecided(), accounted() and others: of what a constant is computed.

What the line computes is read from the user's syntax (graph/formulas.py); the constant in the trace
then says what stood in the place of the name: sqrt(3 * d) = 9.798 means d = 32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from matryoshkafy.axes import dims
from matryoshkafy.graph.formula import OPAQUE, ROUND, Formula

# An inverse power of what the trace holds as a float is that much farther off.
AMPLIFIED = 8
# Names of what counts something else than units, whatever it equals.
NO_WIDTH = re.compile(
    "len|vocab|num_embeddings|class|depth|layer|step|temp|tau|warmup|window|epoch|patch|vox|pixel|"
    "seq|token|time|batch|frame|kernel|stride|dist|bucket|exact|theta|base|period|freq"
)
OF_UNITS = re.compile("dim|width|hidden|units|channel|feat|embd|embed(?!dings)|inner|latent|heads")
NAMED = re.compile(r"[A-Za-z_]\w*(?![\w(.])")
CALL = re.compile(re.escape(OPAQUE) + r"(?!(int|round|floor|ceil|max|min|divmod)\()[A-Za-z_]\w*\(")
# Of no width, whatever stands near them.
KNOWN = (2**0.5, 2**-0.5, math.pi, 2 * math.pi, math.pi**0.5, (2 / math.pi) ** 0.5, math.log(2))
CLAMPS = re.compile(re.escape(OPAQUE) + r"(max\(|min\(|[\d.]+ \*\* )")
# A fan or a count holds a width at most so many times.
MOST = 1024


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


def clamped(
    formulas: Collection[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> bool:
    """Tell whether a line makes a constant of one of `sizes` by max(width, 16), 2 ** bits or
    the like alone: another width may be another case.
    """
    found = _solving(formulas, constant, sizes)
    return bool(found) and all(map(CLAMPS.match, found))


def _solving(
    formulas: Iterable[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> list[str]:
    """Return the names that are one of `sizes` where a formula of one name is the constant."""
    single = [(f.leaves[0][0], f.leaf(constant[0])) for f in formulas if len(f.leaves) == 1]
    return [name for name, leaf in single if any(_close(leaf, n, constant) for n in sizes)]


def of_quotient(attributes: Iterable[tuple[Formula, ...]]) -> bool:
    """Tell whether an attribute that a line reads is a quotient of names: alpha / rank, which may
    equal a width by chance. The root of a product of names (a fan) is one of its widths.
    """
    return any(read and all(map(_divides, read)) for read in attributes)


def _divides(formula: Formula) -> bool:
    powers = [power for _, power in formula.leaves]
    counted = formula.counts or formula.counts_rounds
    return not counted and min(powers, default=0.0) < 0 < max(powers, default=0.0)


def of_other_name(
    expressions: Collection[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> bool:
    """Tell whether a line makes a constant of one of `sizes` by a name that says that it is none:
    max_len, vocab, temperature, and by no other.
    """
    found = _solving((f for f in expressions if f.known), constant, sizes)
    return bool(found) and all(map(_no_width, found))


def names_none(formula: Formula) -> bool:
    """Tell whether a formula is of names that count something else than units."""
    return bool(formula.leaves) and all(_no_width(name) for name, _ in formula.leaves)


def _no_width(text: str) -> bool:
    """Tell whether all names in the text of a leaf count something else than units."""
    names = NAMED.findall(text.removeprefix(OPAQUE).removeprefix(ROUND))
    return bool(names) and all(NO_WIDTH.search(n) and not OF_UNITS.search(n) for n in names)


def of_call(formula: Formula) -> bool:
    """Tell whether a formula is what a function returns of which nothing is known."""
    return any(CALL.match(name) for name, _ in formula.leaves)


def undecided(
    formulas: Collection[Formula],
    constant: tuple[float, float],
    sizes: Collection[int],
    near: Collection[int] = (),
    whole: Collection[int] = (),
) -> str:
    """Return of what a line may compute a constant: of a size that nests somewhere in the model, of
    one that holds what nests near it and is not one of `whole`, which stay, of several names, or in
    a way that no formula says. "" where none is so.
    """
    for formula in (f for f in formulas if not names_none(f)):
        leaf = formula.leaf(constant[0]) if formula.known else math.nan
        stays = any(_close(leaf, n, constant) for n in whole)
        solved = any(_close(leaf, n, constant) for n in sizes)
        holds = not stays and any(_multiple(leaf, n, constant) for n in near)
        several = formula.known and len(formula.leaves) > 1
        if solved or holds or several or formula.opaque:
            return ", ".join(name.removeprefix(OPAQUE) for name, _ in formula.leaves)
    return ""


def accounted(
    expressions: Collection[Formula], constant: tuple[float, float], sizes: Collection[int]
) -> bool:
    """Tell whether a line makes a constant of a number as one types it, which is none of `sizes`.

    sqrt(3 * 64) is as good as a typed number where a head of 64 units stays; 0.1237 by the name of
    an argument was computed somewhere else.
    """
    value = abs(constant[0])
    rounds = [f for f in expressions if not f.plain and f.leaves]
    if any(all(name.startswith(ROUND) for name, _ in f.leaves) for f in rounds):
        return True
    leaves = [f.leaf(constant[0]) if f.leaves else 1.0 for f in expressions]
    numbers = [abs(f.coefficient) for f in expressions if not f.leaves]
    short = [n for n in (value, *leaves) if _typed(n, constant)]
    # What the line itself holds, and the 1.0 of no leaf, accounts for nothing by being short.
    return any(_near(value, n, constant) for n in numbers) or any(
        not any(_close(n, size, constant) for size in sizes) for n in short if n != 1.0
    )


def typed(constant: tuple[float, float]) -> bool:
    """Tell whether a constant is one that is typed."""
    return _typed(abs(constant[0]), constant)


def _typed(number: float, constant: tuple[float, float]) -> bool:
    """Tell whether a number is one that is typed: whole, of four digits, or known."""
    if not math.isfinite(number) or number == 0:
        return False
    known = (round(number), float(f"{number:.4g}"), *KNOWN)
    return any(_near(number, other, constant) for other in known)


def _near(number: float, other: float, constant: tuple[float, float]) -> bool:
    return math.isclose(number, other, rel_tol=constant[1])


def _multiple(leaf: float, size: int, constant: tuple[float, float]) -> bool:
    whole = round(leaf / size) if math.isfinite(leaf) else 0
    return 0 < whole <= MOST and _close(leaf, whole * size, constant)


def _close(leaf: float, size: int, constant: tuple[float, float]) -> bool:
    return math.isclose(leaf, size, rel_tol=AMPLIFIED * constant[1])
