"""Which fields of a configuration give the shapes of a slice: found by changing one at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matryoshkafy.natives.recipe import Recipe, Shapes
from matryoshkafy.natives.tree import Field, numbers

Place = tuple[str, int]
"""A dimension of a tensor: the tensor's name and which of its dimensions."""

Assignment = dict[Field, Any]
"""Fields of a configuration, each with a value."""

MOST_SHAPES = 40
MOST_STEPS = 400
MOST_STRAYS = 5


@dataclass(frozen=True)
class Wanted:
    """What a configuration must give: the shapes of the slice, and how groups shrink.

    widths: units of a group at full size -> its units in the slice, for groups that shrink.
    """

    shapes: Shapes
    widths: Mapping[float, int]
    ratio: float


@dataclass(frozen=True)
class Space:
    """The configurations of a recipe around its own tree."""

    recipe: Recipe
    wanted: Wanted

    @cached_property
    def fields(self) -> Mapping[Field, int | float]:
        """Every number that could be a width: integers above 1, ratios."""
        found = dict(numbers(self.recipe.tree))
        whole = {f: v for f, v in found.items() if isinstance(v, int) and v > 1}
        return whole | {f: v for f, v in found.items() if isinstance(v, float) and v > 0}

    @cached_property
    def base(self) -> Shapes:
        """The shapes that the tree itself gives."""
        return self.recipe.shapes({}) or {}

    def off(self, shapes: Shapes) -> list[Place]:
        """Return where shapes are not those that are wanted."""
        wanted = self.wanted.shapes
        return [
            (name, i)
            for name in shapes.keys() & wanted.keys()
            for i in range(max(len(shapes[name]), len(wanted[name])))
            if shapes[name][i : i + 1] != wanted[name][i : i + 1]
        ]

    def fits(self, changes: Mapping[Field, object]) -> bool:
        """Tell whether changes give every shape that is wanted."""
        shapes = self.recipe.shapes(changes)
        return shapes is not None and self.names(shapes) and not self.off(shapes)

    def names(self, shapes: Shapes) -> bool:
        """Tell whether shapes are of the same tensors; one that no trace reads may be missing.

        Some classes project from one width to another only where the two differ.
        """
        return shapes.keys() <= self.base.keys() and not (
            (self.base.keys() - shapes.keys()) & self.wanted.shapes.keys()
        )

    @cached_property
    def probes(self) -> Mapping[Field, tuple[Any, Shapes]]:
        """For every field: another value that builds, and the shapes that it gives."""
        found = {f: self._probe(f, v) for f, v in self.fields.items()}
        return {f: probe for f, probe in found.items() if probe is not None}

    def _probe(self, field: Field, value: int | float) -> tuple[Any, Shapes] | None:
        others = (2 * value, value / 2) if isinstance(value, float) else _near(value)
        for other in others:
            shapes = self.recipe.shapes({field: other})
            if shapes is not None and shapes.keys() == self.base.keys():
                return other, shapes
        return None

    @cached_property
    def movers(self) -> Mapping[Place, tuple[Field, ...]]:
        """For every dimension that a field moves: those fields."""
        found: dict[Place, list[Field]] = {}
        for field, (_, shapes) in self.probes.items():
            for place in _moved(self.base, shapes):
                found.setdefault(place, []).append(field)
        return {place: tuple(fields) for place, fields in found.items()}

    @cached_property
    def quiet(self) -> tuple[Field, ...]:
        """The fields that move no shape: counts of heads, scales. A count of layers is none."""
        moving = {field for fields in self.movers.values() for field in fields}
        return tuple(field for field in self.probes if field not in moving)

    @cached_property
    def bound(self) -> tuple[Field, ...]:
        """The integers of which no other value builds alone: layers, heads that must divide."""
        whole = (f for f, v in self.fields.items() if isinstance(v, int))
        return tuple(f for f in whole if f not in self.probes)


def _moved(before: Shapes, after: Shapes) -> Iterator[Place]:
    for name, shape in after.items():
        pairs = zip(shape, before[name], strict=False)
        yield from ((name, i) for i, (a, b) in enumerate(pairs) if a != b)


def _near(value: int) -> tuple[int, ...]:
    """Values that keep what divides it, then any other."""
    halves = (value // 2,) if value % 2 == 0 else ()
    return (2 * value, *halves, 3 * value, value + 1, value - 1)


def guess(space: Space) -> Assignment:
    """Return every field that holds a width which shrinks, at what that width becomes."""
    becomes: dict[float, set[int]] = {}
    for name, i in space.off(space.base):
        if i < min(len(space.base[name]), len(space.wanted.shapes[name])):
            becomes.setdefault(space.base[name][i], set()).add(space.wanted.shapes[name][i])
    sure = {full: next(iter(small)) for full, small in becomes.items() if len(small) == 1}
    table: dict[float, int] = {**space.wanted.widths, **sure}
    return {f: table[v] for f, v in space.fields.items() if isinstance(v, int) and v in table}


def _strays(space: Space, field: Field) -> bool:
    """Tell whether a field alone moves a dimension that stays whole."""
    if field not in space.probes:
        return False
    off = set(space.off(space.base))
    return any(
        place not in off and place[0] in space.wanted.shapes
        for place in _moved(space.base, space.probes[field][1])
    )


def _guesses(space: Space) -> Iterator[Assignment]:
    """Yield the guess, then without some of the fields whose value may be a width by chance."""
    every = guess(space)
    strays = [field for field in every if _strays(space, field) or field in space.bound]
    strays = sorted(strays, key=lambda field: field in space.bound)[:MOST_STRAYS]
    for number in range(len(strays) + 1):
        for some in itertools.combinations(strays, number):
            yield {f: v for f, v in every.items() if f not in some}


def assignments(space: Space) -> Iterator[Assignment]:
    """Yield changes of fields that give every shape that is wanted, the likeliest first."""
    seen = [first for first in _guesses(space) if space.fits(first)]
    yield from seen
    steps = [0]
    for found in _assigned(space, {}, steps):
        if found not in seen:
            seen.append(found)
            yield found
        if len(seen) == MOST_SHAPES:
            return


def _assigned(space: Space, done: Assignment, steps: list[int]) -> Iterator[Assignment]:
    """Mend the dimension that fewest fields move, by each of them; then what is still off."""
    steps[0] += 1
    if steps[0] > MOST_STEPS:
        return
    shapes = _shapes(space, done)
    if shapes is None or not space.names(shapes):
        return
    places = space.off(shapes)
    if not places:
        yield done
        return
    free = {p: [f for f in space.movers.get(p, ()) if f not in done] for p in places}
    place = min(places, key=lambda p: (len(free[p]), p))
    for field, value in _options(space, done, place, free[place]):
        yield from _assigned(space, done | {field: value}, steps)


def _shapes(space: Space, done: Assignment) -> Shapes | None:
    """A width may only build with the count of heads that divides it."""
    shapes = space.recipe.shapes(done)
    if shapes is None:
        shapes = space.recipe.shapes(heads(space) | done)
    return shapes


def heads(space: Space) -> Assignment:
    """Return the fields that move no shape alone, but hold the units of a group that shrinks."""
    widths, fields = space.wanted.widths, space.fields
    return {f: widths[fields[f]] for f in (*space.quiet, *space.bound) if fields[f] in widths}


def counted(space: Space, shaped: Mapping[Field, object]) -> Iterator[dict[Field, int]]:
    """Yield counts that move shapes, and together with others do not: 8 heads of 4 keys and values.

    The width alone may give every shape, with the counts of the full model and narrower heads.
    """
    found = {f: _scaled(space, v) for f, v in space.fields.items() if f not in shaped}
    scaled = {f: v for f, v in found.items() if v is not None and f in space.probes}
    whole = list(scaled)
    moving = {f for f in whole if f not in space.quiet}
    for number in (1, 2, 3):
        for some in itertools.combinations(whole, number):
            changes = {f: scaled[f] for f in some}
            if moving & set(some) and space.fits({**shaped, **changes}):
                yield changes


def _scaled(space: Space, value: int | float) -> int | None:
    """Return what a count becomes: of a group that shrinks, or in the ratio of the widths."""
    if not isinstance(value, int):
        return None
    ratio = value * space.wanted.ratio
    given = space.wanted.widths.get(value, ratio)
    return int(given) if given == int(given) and given >= 1 else None


def families(counts: Mapping[Field, object]) -> Iterator[dict[Field, object]]:
    """Yield the counts that stand in one list together: the heads of every stage."""
    for above in dict.fromkeys(field[:-1] for field in counts if isinstance(field[-1], int)):
        yield {f: v for f, v in counts.items() if f[:-1] == above}


def _options(
    space: Space, done: Assignment, place: Place, fields: list[Field]
) -> Iterator[tuple[Field, Any]]:
    """Yield (field, value) that give a dimension its size; widths of groups first."""
    found = [
        (space.wanted.widths.get(space.fields[field]) != value, isinstance(value, float), i, value)
        for i, field in enumerate(fields)
        for value in _implied(space, done, place, field)
    ]
    for _, _, i, value in sorted(found):
        yield fields[i], value


def _implied(space: Space, done: Assignment, place: Place, field: Field) -> set[Any]:
    """Return values of a field that give a dimension its size: along a line or a hyperbola."""
    name, i = place
    value, (other, probed) = space.fields[field], space.probes[field]
    now, then = _shapes(space, done), _shapes(space, {**done, field: other})
    if now is None:
        return set()
    have, wanted = now[name][i], space.wanted.shapes[name][i]
    before, after = space.base[name][i], probed[name][i]
    step = then[name][i] - have if then is not None else after - before
    found: set[float] = {value + (wanted - have) * (other - value) / step} if step else set()
    if abs(after * other - before * value) <= other:
        found.add(value * have / wanted)
    if isinstance(value, float):
        return {v for v in found if v > 0 and math.isfinite(v)}
    return {round(v) for v in found if v >= 0.5 and abs(v - round(v)) < 1e-6}
