"""Solved dims against brute force: every index is labelled by numpy and kept or not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Nested, Sum
from matryoshkafy.errors import MatryoshkafyError

GROUPS = (5, 8, 3)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=200, deadline=None)


def random_dim(source: random.Random, depth: int = 2) -> Dim:
    """Return a row-major product in which at most the outermost factors nest, as plans have."""
    factors: list[dims.Factor] = []
    if source.random() < 0.5:
        factors.append(source.randint(1, 3))
    if depth and source.random() < 0.4:
        factors.append(
            Sum(tuple(random_dim(source, depth - 1) for _ in range(source.randint(1, 3))))
        )
    elif source.random() < 0.8:
        group = source.randrange(len(GROUPS))
        factors.append(Nested(group, GROUPS[group]))
    factors.append(source.randint(1, 3))
    return tuple(factors)


def random_ladder(source: random.Random) -> tuple[dims.Widths, ...]:
    """Return ascending widths of every group, ending at the full ones."""
    steps = source.randint(1, 3)
    columns = [sorted(source.choices(range(1, n + 1), k=steps)) + [n] for n in GROUPS]
    return tuple(zip(*columns, strict=True))


def inside(dim: Dim, widths: dims.Widths) -> np.ndarray:
    """Whether each index of a dim is kept, by writing out every index."""
    keep = np.ones(1, dtype=bool)
    for factor in dim:
        keep = np.logical_and.outer(keep, factor_inside(factor, widths)).reshape(-1)
    return keep


def factor_inside(factor: dims.Factor, widths: dims.Widths) -> np.ndarray:
    if isinstance(factor, Sum):
        return np.concatenate([inside(p, widths) for p in factor.segments])
    if isinstance(factor, Nested):
        return np.arange(factor.size) < widths[factor.group]
    return np.ones(factor, dtype=bool)


@quick
@given(seeds)
def test_kept_is_what_brute_force_keeps(seed: int) -> None:
    source = random.Random(seed)
    dim, ladder = random_dim(source), random_ladder(source)
    for widths in ladder:
        expected = np.flatnonzero(inside(dim, widths)).tolist()
        segments = dims.kept(dim, widths)
        assert [i for a, b in segments for i in range(a, b)] == expected
        assert dims.size_at(dim, widths) == len(expected)
        assert all(b < c for (_, b), (c, _) in zip(segments, segments[1:], strict=False))
    assert dims.size(dim) == len(inside(dim, GROUPS))


@quick
@given(seeds)
def test_runs_name_the_first_level_that_keeps_an_index(seed: int) -> None:
    source = random.Random(seed)
    dim, ladder = random_dim(source), random_ladder(source)
    flat = dims.runs(dim, ladder)
    levels = [v for n, v in zip(flat[::2], flat[1::2], strict=True) for _ in range(n)]
    table = np.stack([inside(dim, widths) for widths in ladder])
    assert levels == table.argmax(0).tolist()


@quick
@given(seeds)
def test_smaller_sizes_keep_a_part_of_what_larger_ones_keep(seed: int) -> None:
    source = random.Random(seed)
    dim, ladder = random_dim(source), random_ladder(source)
    for small, large in zip(ladder, ladder[1:], strict=False):
        assert not (inside(dim, small) & ~inside(dim, large)).any()
        assert dims.size_at(dim, small) <= dims.size_at(dim, large)


@quick
@given(seeds)
def test_json_round_trip(seed: int) -> None:
    dim = random_dim(random.Random(seed))
    assert dims.from_json(dims.to_json(dim)) == dim


@quick
@given(seeds)
def test_a_dim_nests_where_a_group_stands_in_it(seed: int) -> None:
    dim = random_dim(random.Random(seed))
    smallest = dims.size_at(dim, (1, 1, 1))
    assert dims.is_nested(dim) == (smallest < dims.size(dim)) == bool(list(dims.groups_of(dim)))


@pytest.mark.parametrize("value", [3, None, {}, ["h0:4"], ["g0"], ["g:4"], ["gx:4"], [-1], [True],
                                   [1.5], ["g0:-4"]])  # fmt: skip
def test_what_is_no_dim_is_refused(value: object) -> None:
    with pytest.raises(MatryoshkafyError, match="damaged"):
        dims.from_json(value)


def test_a_dim_nested_too_deep_is_refused() -> None:
    value: list[object] = []
    for _ in range(40):
        value = [value]
    with pytest.raises(MatryoshkafyError, match="damaged"):
        dims.from_json(value)


def test_packed_heads() -> None:
    """3 x (H of 4 heads) x 2: two heads of q, of k and of v."""
    packed: Dim = (3, Nested(0, 4), 2)
    assert dims.kept(packed, (2,)) == ((0, 4), (8, 12), (16, 20))
    assert dims.size_at(packed, (2,)) == 12
    assert dims.runs(packed, ((2,), (4,))) == (4, 0, 4, 1) * 3
