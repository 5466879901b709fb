"""snapped(): a plan whose widths are multiples of a number, so that hardware and configs fit."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Nested
from matryoshkafy.errors import PlanError
from matryoshkafy.plan.plan import Plan


def snapped(plan: Plan, multiple: object) -> Plan:
    """Return the plan with every width rounded up to a multiple, at most to the full width.

    A group counts in what its units span: with 12 heads of 64, multiples of 128 are pairs of heads.
    A hidden layer of four times a width stays four times that width: most classes say it so.
    Sizes follow the main group; what becomes equal to the size below it is left out. A remark says
    which sizes moved.

    Args:
        plan: as solved for the sizes that were asked for.
        multiple: at least 1; 1 changes nothing.

    Raises:
        PlanError: the multiple is no positive integer.
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise PlanError(
            f"multiple_of={multiple!r} was given; expected a positive integer such as 8 or 64"
        )
    if multiple == 1:
        return plan
    steps = [multiple // math.gcd(multiple, span) for span in _spans(plan)]
    times = _times(plan)
    ladder = [_rounded(plan, widths, steps, times) for widths in plan.ladder]
    sizes = [plan.width_of(widths) for widths in ladder]
    # Of sizes that became equal the first stands, but of those at the full one the last, whose
    # other groups are whole as well.
    kept = [i for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    kept = kept[:-1] + [len(sizes) - 1] if sizes[kept[-1]] == sizes[-1] else kept
    moved = {old: new for old, new in zip(plan.sizes, sizes, strict=True) if old != new}
    return replace(
        plan,
        sizes=tuple(sizes[i] for i in kept),
        ladder=tuple(ladder[i] for i in kept),
        remarks=(*plan.remarks, *_remarks(moved, multiple)),
    )


def _rounded(
    plan: Plan, widths: dims.Widths, steps: list[int], times: dict[int, tuple[int, int]]
) -> dims.Widths:
    pairs = zip(plan.groups, widths, steps, strict=True)
    out = [min(group.size, -(-width // step) * step) for group, width, step in pairs]
    for group, (other, count) in times.items():
        out[group] = count * out[other]
    return tuple(out)


def _times(plan: Plan) -> dict[int, tuple[int, int]]:
    """Return {group: (other, n)}: groups of n times the width of the one that all of their weights
    have beside them, as the hidden layer of a feed-forward net has.
    """
    beside: dict[int, set[int]] = {}
    for shape in plan.parameters.values():
        alone = [f[0].group if len(f) == 1 and isinstance(f[0], Nested) else None for f in shape]
        for a, b in itertools.permutations(alone, 2):
            if a is not None:
                beside.setdefault(a, set()).update(() if b is None else {b})
    sizes = [group.size for group in plan.groups]
    pairs = ((a, next(iter(found))) for a, found in beside.items() if len(found) == 1)
    chosen = {a: (b, sizes[a] // sizes[b]) for a, b in pairs if sizes[a] % sizes[b] == 0 and a != b}
    return {a: (b, n) for a, (b, n) in chosen.items() if n > 1 and b not in chosen}


def _spans(plan: Plan) -> list[int]:
    """Return what one unit of each group spans where it mostly stands: 1, or head_dim."""
    counts = [Counter({1: 0}) for _ in plan.groups]
    for shape in plan.parameters.values():
        for dim in shape:
            for group, span in _nested(dim):
                counts[group][span] += 1
    return [count.most_common(1)[0][0] for count in counts]


def _nested(dim: dims.Dim) -> Iterator[tuple[int, int]]:
    for i, factor in enumerate(dim):
        if isinstance(factor, Nested):
            yield factor.group, dims.size(dim[i + 1 :])
        elif isinstance(factor, dims.Sum):
            inner = dims.size(dim[i + 1 :])
            for part in factor.segments:
                yield from ((group, span * inner) for group, span in _nested(part))


def _remarks(moved: dict[int, int], multiple: object) -> Iterator[str]:
    if moved:
        pairs = ", ".join(f"{old} became {new}" for old, new in moved.items())
        yield f"sizes are multiples of {multiple}: {pairs}"
