"""Trials: a traced graph beside the model at sizes that the example does not have.

A trace notes every branch on sizes that torch sees. What it does not see (a batch of 1 that takes
a path of its own, a length that is read elsewhere) shows in a trial: the graph and the model run on
the example with rows repeated or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice

import torch

from matryoshkafy.graph.guards import Apply, Expr, Guard, Guards, Size, value_of

Sizes = Mapping[Size, int]
# How far from the example's size another one is looked for.
FAR = 16
# True: graph and model agree. False: they differ. None: the model itself fails at such sizes.
Verdict = Callable[[Sequence[torch.Tensor]], bool | None]


def trials_of(
    guards: Guards, flat: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Return the example with every free size another (one more, where the guards allow it), and
    with 1 of each; None where no size is free, or where they cannot all change at once.
    """
    shapes = [tuple(t.shape) for t in flat]
    other = _jointly(guards, shapes, others_of(guards, shapes))
    ones = [_changed(guards, shapes, g, 1) for g in classes(guards)]
    one = _jointly(guards, shapes, ones)
    return None if other is None or one is None else (resized(flat, other), resized(flat, one))


def others_of(guards: Guards, shapes: Sequence[Sequence[int]]) -> list[Sizes | None]:
    """Return for each class of free sizes the first other one, None where there is none."""
    return [next(other_sizes(guards, shapes, g), None) for g in classes(guards)]


def tied(guards: Guards, flat: Sequence[torch.Tensor], runs: Verdict) -> Guards:
    """Return the guards where sizes that the model itself cannot change alone are held equal.

    A mask that is indexed by the rows of the ids says nothing of its own batch to a trace.

    Args:
        guards: what the trace assumed.
        flat: the flat tensors of the example.
        runs: tells whether the model computes anything of flat tensors.
    """
    shapes = [tuple(t.shape) for t in flat]

    def alone(group: tuple[Size, ...]) -> bool:
        tried = list(other_sizes(guards, shapes, group))
        return not tried or any(runs(resized(flat, sizes)) for sizes in tried)

    def alike(a: Size, b: Size) -> bool:
        return a.dim == b.dim and shapes[a.leaf][a.dim] == shapes[b.leaf][b.dim]

    pairs = [(a, b) for a, b in combinations(classes(guards), 2) if alike(a[0], b[0])]
    free = {group: alone(group) for group in {g for pair in pairs for g in pair}}
    new = (
        Guard(Apply("eq", (b[0], a[0])), "the model itself fails where they differ")
        for a, b in pairs
        if not (free[a] and free[b])
    )
    return replace(guards, conditions=(*guards.conditions, *new))


def from_one(guards: Guards) -> Guards:
    """Return the guards of a graph that is the model at every size from 1."""
    return _from(guards, [(group[0], 1) for group in classes(guards)])


def settled(guards: Guards, flat: Sequence[torch.Tensor], agree: Verdict) -> Guards:
    """Return the guards after trials: sizes at which the graph is not the model are refused.

    Args:
        guards: what the trace assumed.
        flat: the flat tensors of the example.
        agree: runs graph and model on flat tensors.
    """
    shapes = [tuple(t.shape) for t in flat]

    def verdict(sizes: Sizes | None) -> bool | None:
        return None if sizes is None else agree(resized(flat, sizes))

    groups = classes(guards)
    others = others_of(guards, shapes)
    # One trial of all sizes at once mostly settles it; each size by itself only where that fails.
    jointly = verdict(_jointly(guards, shapes, others)) is True
    fixed: dict[Size, int] = {}
    for group in () if jointly else groups:
        found = (verdict(sizes) for sizes in other_sizes(guards, shapes, group))
        if not next((v for v in found if v is not None), False):
            fixed |= {s: shapes[s.leaf][s.dim] for s in group}
    guards = guards.with_fixed(fixed, "the traced graph is not the model at other sizes")
    # Size 1 has a trial of its own: broadcasting and squeeze take other paths there.
    groups = classes(guards)
    ones = [_changed(guards, shapes, g, 1) for g in groups]
    jointly = verdict(_jointly(guards, shapes, ones)) is True
    least = [
        (g[0], 1 if jointly or verdict(one) else min(2, shapes[g[0].leaf][g[0].dim]))
        for g, one in zip(groups, ones, strict=True)
    ]
    return _from(guards, least)


def _from(guards: Guards, least: Sequence[tuple[Size, int]]) -> Guards:
    lower = (Guard(Apply("ge", (size, low))) for size, low in least)
    return replace(guards, conditions=(*guards.conditions, *lower))


def classes(guards: Guards) -> list[tuple[Size, ...]]:
    """Return the free sizes; those that the guards hold equal stand together."""
    found = {size: [size] for size in guards.free}
    for guard in guards.conditions:
        a, b = (*guard.condition.args, None, None)[:2]
        if guard.condition.op == "eq" and a in found and b in found and found[a] is not found[b]:
            found[b].extend(found[a])
            found |= dict.fromkeys(found[a], found[b])
    return [tuple(group) for group in {id(g): g for g in found.values()}.values()]


def other_sizes(
    guards: Guards, shapes: Sequence[Sequence[int]], group: Sequence[Size]
) -> Iterator[Sizes]:
    """Yield other sizes of a class, near the example's, that the guards allow: one more, one less,
    double, half; where they allow none of these (even ones alone) the nearest that they do.
    """
    now = shapes[group[0].leaf][group[0].dim]
    near = dict.fromkeys((now + 1, now - 1, 2 * now, now // 2))
    far = (now + sign * step for step in range(2, FAR + 1) for sign in (1, -1))

    def allowed(numbers: Iterable[int]) -> Iterator[Sizes]:
        found = (_changed(guards, shapes, group, n) for n in numbers if n > 1 and n != now)
        return (sizes for sizes in found if sizes is not None)

    found = allowed(near)
    first = next(found, None)
    if first is None:
        yield from islice(allowed(far), 1)
    else:
        yield first
        yield from found


def _changed(
    guards: Guards, shapes: Sequence[Sequence[int]], group: Sequence[Size], size: int
) -> Sizes | None:
    """Return all sizes that change when a class has another size; None outside the guards."""
    sizes = dict.fromkeys(group, size)
    for guard in guards.conditions:
        target, expr = _derived(guard)
        if target is not None and target not in sizes:
            n = value_of(expr, _with(shapes, sizes))
            if n != shapes[target.leaf][target.dim]:
                sizes[target] = n
    return sizes if _allowed(guards, shapes, sizes) else None


def _derived(guard: Guard) -> tuple[Size | None, Expr]:
    """A condition such as mask.shape[1] == ids.shape[1] + 1."""
    left, right = (*guard.condition.args, 0, 0)[:2]
    if guard.condition.op == "eq" and isinstance(left, Size) and isinstance(right, Apply):
        return left, right
    return None, 0


def _jointly(
    guards: Guards, shapes: Sequence[Sequence[int]], parts: Sequence[Sizes | None]
) -> Sizes | None:
    sizes: dict[Size, int] = {}
    for part in parts:
        if part is None:
            return None
        sizes |= part
    return sizes if sizes and _allowed(guards, shapes, sizes) else None


def _allowed(guards: Guards, shapes: Sequence[Sequence[int]], sizes: Sizes) -> bool:
    after = _with(shapes, sizes)
    return all(guard.holds(after) for guard in guards.conditions)


def _with(shapes: Sequence[Sequence[int]], sizes: Sizes) -> list[list[int]]:
    return [[sizes.get(Size(i, d), n) for d, n in enumerate(s)] for i, s in enumerate(shapes)]


def resized(flat: Sequence[torch.Tensor], sizes: Sizes) -> list[torch.Tensor]:
    """Return the inputs with rows repeated or left out."""
    out = list(flat)
    for size, n in sizes.items():
        value = out[size.leaf].detach()
        rows = torch.arange(n, device=value.device) % value.shape[size.dim]
        out[size.leaf] = value.index_select(size.dim, rows)
    return out
