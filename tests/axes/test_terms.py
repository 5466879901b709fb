"""The algebra of axes: its laws, on random terms."""

from __future__ import annotations

import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import matryoshkafy as mk
from matryoshkafy import axes
from matryoshkafy.axes.terms import Axis, Reason, Sum, Term

WHY = Reason("test")
seeds = st.integers(0, 2**32)
quick = settings(max_examples=150, deadline=None)


def random_term(source: random.Random, depth: int = 1) -> Term:
    """Return a term of up to two factors: axes, copies, sums, shared axes among them."""
    factors: list[axes.Factor] = []
    for _ in range(source.randint(1, 2)):
        kind = source.random()
        if kind < 0.25 and depth:
            factors.append(
                Sum([random_term(source, depth - 1) for _ in range(source.randint(2, 3))])
            )
        elif kind < 0.4:
            factors.extend(axes.copies(source.randint(1, 3)))
        else:
            factors.append(Axis(source.choice((1, 2, 3, 4, 6)), "a"))
    return axes.resolve(tuple(factors))


def other_term(source: random.Random, size: int) -> Term:
    """Return a random term of a given size: a product of axes, or two segments."""
    if size > 1 and source.random() < 0.4:
        at = source.randint(1, size - 1)
        return axes.concatenate([(Axis(at),), (Axis(size - at),)])
    divisor = source.choice([d for d in range(1, size + 1) if size % d == 0])
    return axes.resolve((Axis(size // divisor), Axis(divisor)))


def same(a: Term, b: Term) -> bool:
    """Whether two terms are made of the same units of the same axes, in the same order."""
    return units(a) == units(b)


def units(term: Term) -> list[frozenset[tuple[int, int]]]:
    """Return for every unit along a dimension the axes that it belongs to, and where in each."""
    out = [frozenset[tuple[int, int]]()]
    for factor in axes.resolve(term):
        out = [u | v for u in out for v in _factor_units(factor)]
    return out


def _factor_units(factor: axes.Factor) -> list[frozenset[tuple[int, int]]]:
    if isinstance(factor, Sum):
        return [u for segment in factor.segments for u in units(segment)]
    whole = factor.fixed is axes.COPIES
    return [frozenset() if whole else frozenset({(id(factor), i)}) for i in range(factor.size)]


@quick
@given(seeds)
def test_unify_makes_one_term_or_holds_both(seed: int) -> None:
    source = random.Random(seed)
    a = random_term(source)
    b = other_term(source, axes.size(a))
    before = axes.size(a)
    if axes.unify(a, b, WHY):
        assert same(a, b)
    else:
        assert axes.is_fixed(a) and axes.is_fixed(b)
    assert axes.size(axes.resolve(a)) == axes.size(axes.resolve(b)) == before


@quick
@given(seeds)
def test_unify_again_changes_no_unit(seed: int) -> None:
    source = random.Random(seed)
    a = random_term(source)
    b = other_term(source, axes.size(a))
    met = axes.unify(a, b, WHY)
    first = units(a), units(b)
    again = axes.unify(a, b, WHY)
    assert again >= met or (axes.is_fixed(a) and axes.is_fixed(b))
    assert (units(a), units(b)) == first


@quick
@given(seeds)
def test_unify_is_symmetric(seed: int) -> None:
    forth, back = (pair_of(seed) for _ in range(2))
    assert axes.unify(*forth, WHY) == axes.unify(*back[::-1], WHY)
    assert sizes(forth[0]) == sizes(back[0])
    assert [leaf.fixed for leaf in axes.leaves(forth[0])] == [
        leaf.fixed for leaf in axes.leaves(back[0])
    ]


def pair_of(seed: int) -> tuple[Term, Term]:
    source = random.Random(seed)
    a = random_term(source)
    return a, other_term(source, axes.size(a))


def sizes(term: Term) -> list[object]:
    return [f.size if isinstance(f, Axis) else [sizes(s) for s in f.segments]
            for f in axes.resolve(term)]  # fmt: skip


def test_a_term_meets_itself() -> None:
    term = (Axis(3), *axes.copies(2), Axis(4))
    assert axes.unify(term, term, WHY)
    assert not axes.is_fixed(term)


@pytest.mark.parametrize("turned", [False, True])
def test_two_axes_of_one_size_become_one(turned: bool) -> None:
    births = itertools.count()
    elder, younger = (Axis(6, name, None, births) for name in ("elder", "younger"))
    pair = [(younger,), (elder,)]
    assert axes.unify(*(pair[::-1] if turned else pair), WHY)
    assert axes.resolve((younger,)) == (elder,) == axes.resolve((elder,))


def test_a_walk_leaves_nothing_behind_for_the_next() -> None:
    """Copies of one number are one axis, but no state: what one term met, no other hears of."""
    halves = axes.concatenate([(Axis(2),), (Axis(3),)])
    assert not axes.unify(axes.copies(5), halves, WHY) and axes.is_fixed(halves)
    assert axes.resolve(axes.copies(5)) == axes.copies(5)
    assert Axis(4).serial == Axis(4).serial


def test_walks_in_several_threads_find_one_plan() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    call = (model, (torch.randn(2, 3, 16),))
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: mk.inspect(*call, free=["src"]).to_json(), range(4)))
    assert len(set(plans)) == 1


def test_the_larger_axis_splits_at_the_smaller() -> None:
    model, heads, dim = Axis(12), Axis(4), Axis(3)
    assert axes.unify((model,), (heads, dim), WHY)
    assert same((model,), (heads, dim))


def test_sizes_without_a_common_divisor_hold_both() -> None:
    a, b = (Axis(6), Axis(5)), (Axis(10), Axis(3))
    assert not axes.unify(a, b, WHY)
    assert axes.is_fixed(a) and axes.is_fixed(b)


def test_fixing_spreads_over_what_is_one() -> None:
    a, b, c = (Axis(8) for _ in range(3))
    axes.unify((a,), (b,), WHY)
    axes.fix((b,), WHY)
    axes.unify((c,), (a,), WHY)
    assert all(axes.is_fixed((x,)) for x in (a, b, c))


def test_a_fixed_axis_fixes_the_parts_it_splits_into() -> None:
    whole, part = Axis(12), Axis(3)
    axes.fix((whole,), WHY)
    axes.unify((whole,), (Axis(4), part), WHY)
    assert axes.is_fixed((part,)) and axes.is_fixed((whole,))


@quick
@given(seeds)
def test_what_is_cut_and_laid_together_is_as_before(seed: int) -> None:
    source = random.Random(seed)
    term = (Axis(source.randint(2, 30)),)
    size = axes.size(term)
    marks = sorted(source.sample(range(1, size), source.randint(0, min(3, size - 1))))
    lengths = [b - a for a, b in zip([0, *marks], [*marks, size], strict=True)]
    pieces = axes.cut(term, lengths)
    assert pieces is not None and [axes.size(p) for p in pieces] == lengths
    assert same(axes.concatenate(pieces), term)


@quick
@given(seeds)
def test_cut_of_any_term_keeps_the_lengths_and_the_whole(seed: int) -> None:
    source = random.Random(seed)
    term = random_term(source)
    size = axes.size(term)
    at = source.randint(1, size) if size > 1 else 1
    pieces = axes.cut(term, [at, size - at]) if at < size else None
    if pieces is None:
        return
    assert [axes.size(p) for p in pieces] == [at, size - at]
    assert same(axes.concatenate(pieces), term)


@quick
@given(seeds)
def test_regroup_then_product_is_the_term(seed: int) -> None:
    source = random.Random(seed)
    term = random_term(source)
    size = axes.size(term)
    outer = source.choice([d for d in range(1, size + 1) if size % d == 0])
    pieces = axes.regroup(term, [outer, size // outer])
    if pieces is None:
        return
    assert [axes.size(p) for p in pieces] == [outer, size // outer]
    assert same(pieces[0] + pieces[1], term)


def test_equal_pieces_are_copies() -> None:
    part = (Axis(5),)
    assert same(axes.concatenate([part, part, part]), (*axes.copies(3), *part))


def test_a_common_suffix_is_a_factor() -> None:
    a, b, unit = Axis(2), Axis(3), Axis(4)
    (outer, inner) = axes.concatenate([(a, unit), (b, unit)])
    assert inner is unit and isinstance(outer, Sum) and outer.size == 5


def test_chunk_and_view_of_a_packed_axis_meet() -> None:
    """qkv of 3 H d: split into three pieces, or seen as [3, H, d]: the same axes."""
    packed = (Axis(24),)
    first, second, third = axes.cut(packed, [8, 8, 8]) or ()
    axes.unify(first, second, WHY)
    axes.unify(second, third, WHY)
    pieces = axes.regroup(packed, [3, 4, 2])
    assert pieces is not None
    assert same(pieces[1] + pieces[2], first) and not axes.is_fixed(first)
    assert axes.is_fixed(pieces[0])


def test_pieces_of_a_sum_align_on_its_borders() -> None:
    gate, up = (Axis(4),), (Axis(6),)
    whole = axes.concatenate([gate, up])
    pieces = axes.cut(whole, [4, 6])
    assert pieces is not None and same(pieces[0], gate) and same(pieces[1], up)


def test_two_sums_meet_segment_by_segment() -> None:
    a, b, c, d = (Axis(n) for n in (4, 6, 4, 6))
    assert axes.unify(axes.concatenate([(a,), (b,)]), axes.concatenate([(c,), (d,)]), WHY)
    assert same((a,), (c,)) and same((b,), (d,))


def test_a_longer_segment_is_cut_where_the_other_sum_ends_one() -> None:
    a, b, c, d = (Axis(n) for n in (7, 3, 4, 6))
    assert axes.unify(axes.concatenate([(a,), (b,)]), axes.concatenate([(c,), (d,)]), WHY)
    assert sum(leaf.size for leaf in axes.leaves((a,))) == 7
    assert same(axes.concatenate([(a,), (b,)]), axes.concatenate([(c,), (d,)]))


@quick
@given(st.lists(seeds, min_size=2, max_size=6))
def test_many_unifications_end_and_keep_sizes(many: list[int]) -> None:
    """Random equations over one pool of terms: nothing loops, no size changes."""
    source = random.Random(many[0])
    pool = [(Axis(source.choice((6, 12, 24))),) for _ in range(6)]
    pool += [(Axis(2), Axis(source.choice((3, 6)))) for _ in range(3)]
    pool += [axes.concatenate([pool[0], pool[1]]), axes.concatenate([pool[2], pool[2]])]
    before = [axes.size(t) for t in pool]
    for seed in many:
        source = random.Random(seed)
        a, b = source.choice(pool), source.choice(pool)
        if axes.size(a) == axes.size(b):
            axes.unify(a, b, WHY)
        elif axes.size(a) > axes.size(b):
            axes.cut(a, [axes.size(b), axes.size(a) - axes.size(b)])
    assert [math.prod(f.size for f in axes.resolve(t)) for t in pool] == before


def test_size_one_carries_nothing() -> None:
    four = Axis(4)
    assert axes.resolve((Axis(1), four, Axis(1))) == (four,)
    assert axes.copies(1) == ()


def test_regroup_of_a_sum_ends() -> None:
    term = axes.concatenate([(Axis(6), Axis(2)), (Axis(4),)])
    pieces = axes.regroup(term, [4, 4])
    assert pieces is None or [axes.size(p) for p in pieces] == [4, 4]


def test_three_vectors_laid_together_come_apart_as_heads() -> None:
    """BEiT adds cat(q_bias, k_bias, v_bias): three axes that the view of the heads makes one."""
    vectors = [Axis(64, name) for name in "qkv"]
    packed = Axis(192, "qkv")
    assert axes.unify((packed,), axes.concatenate([(v,) for v in vectors]), WHY)
    pieces = axes.regroup((packed,), [3, 16, 4])
    assert pieces is not None
    three, heads, width = pieces
    assert axes.is_fixed(three)
    for vector in vectors:
        assert axes.resolve((vector,)) == (*axes.resolve(heads), *axes.resolve(width))
    assert not axes.is_fixed(heads)
