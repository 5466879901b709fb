"""funnel(): many documents by a short prefix, fewer by longer ones (MRL, section 4.3, "funnel").

A stage that goes from size m to size M adds only the products of the units between them: the score
of a longer prefix is a running sum, divided by the lengths of the two prefixes. What an approximate
index found is scored anew, from the first unit on: its own scores are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryoshkafy.serving.index import ShortIndex
from matryoshkafy.serving.select import best_of
from matryoshkafy.serving.vectors import Floats, ServingError, Vectors

Ids = NDArray[np.int64]
# Units of documents that are copied at a time: half a megabyte.
CACHED = 2**17


@dataclass(frozen=True, eq=False)
class Ranking:
    """The documents found for each query, best first.

    Args:
        ids: int64 [queries, k], rows of the documents' table; -1 (score -inf) where an
            approximate index found fewer than k.
        scores: float32 [queries, k], cosines at the last stage's size.
        products: multiply-adds per query, those of an index as it counted them.
    """

    ids: Ids
    scores: Floats
    products: float


def exact(queries: Vectors, documents: Vectors, *, size: int, k: int) -> Ranking:
    """Return the nearest documents at one size, by comparing with all of them.

    Args:
        queries: their vectors.
        documents: the table to search.
        size: the prefix that is compared.
        k: how many documents each query gets.
    """
    return funnel(queries, documents, sizes=[size], keep=[k])


def funnel(  # noqa: PLR0913  the public signature
    queries: Vectors,
    documents: Vectors,
    *,
    sizes: Sequence[int],
    keep: Sequence[int],
    index: ShortIndex | None = None,
    batch: int | None = None,
) -> Ranking:
    """Return the nearest documents, found in stages of growing size and shrinking lists.

    Args:
        queries: the queries' table, [Q, D].
        documents: the documents' table, [N, D], of the same model.
        sizes: ascending sizes of the ladder, one a stage.
        keep: how many documents each stage hands on; must not grow. The last is k.
        index: an approximate index of the first stage's size; without one that stage is exact.
        batch: queries that are searched together; 512 where all documents are scored, 4096 where
            an index finds short lists.

    Raises:
        ServingError: where sizes are no rungs, lists grow, or the tables are of two models.
    """
    queries.check_against(documents)
    stages = _stages(documents, sizes, keep)
    if index is not None:
        index.check(documents, stages[0][0])
    step = batch if batch is not None else 512 if index is None else 4096
    if step < 1:
        raise ServingError(f"batch={batch} was given; expected at least one query at a time")
    parts = [
        _search(queries, documents, slice(at, at + step), (stages, index))
        for at in range(0, len(queries), step)
    ]
    ids, scores = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    first = sum(part[2] for part in parts) / len(queries)
    if index is not None:
        stages = [(0, stages[0][1]), *(stages[1:] or stages)]
    return Ranking(ids, scores, first + _later(stages))


def products(count: int, stages: Sequence[tuple[int, int]]) -> float:
    """Return the multiply-adds of one query over `count` documents, the first stage exact.

    Args:
        count: how many documents there are.
        stages: (size, how many are kept) pairs.
    """
    return float(count * stages[0][0]) + _later(stages)


def _later(stages: Sequence[tuple[int, int]]) -> float:
    return float(sum(kept * (after - before) for (before, kept), (after, _) in pairwise(stages)))


def _stages(documents: Vectors, sizes: Sequence[int], keep: Sequence[int]) -> list[tuple[int, int]]:
    if len(sizes) != len(keep) or not sizes:
        raise ServingError(
            f"sizes {list(sizes)} and keep {list(keep)} were given; expected one list length for "
            "each size"
        )
    if not all(isinstance(kept, Integral) for kept in keep):
        raise ServingError(f"keep {list(keep)} was given; expected whole numbers of documents")
    for size in sizes:
        documents.level(size)
    if any(a >= b for a, b in pairwise(sizes)):
        raise ServingError(f"sizes {list(sizes)} must ascend: each stage reads a longer prefix")
    if any(a < b for a, b in pairwise(keep)) or keep[-1] < 1:
        raise ServingError(
            f"keep {list(keep)} must not grow and end at 1 or more: a stage can only choose among "
            "what the one before it kept"
        )
    return [(size, min(kept, len(documents))) for size, kept in zip(sizes, keep, strict=True)]


def _search(
    queries: Vectors,
    documents: Vectors,
    rows: slice,
    how: tuple[list[tuple[int, int]], ShortIndex | None],
) -> tuple[Ids, Floats, float]:
    stages, index = how
    asked = queries.values[rows]
    if index is None:
        size, kept = stages[0]
        scores: Floats = asked[:, :size] @ np.transpose(documents.front(size))
        ids, counted = best_of(scores, kept), float(len(documents) * size)
        scores = _taken(scores, ids)
    else:
        found, counted = index.search(queries.at(stages[0][0], rows), stages[0][1])
        stages = stages[1:] or stages
        size, kept = stages[0]
        scores = np.where(found < 0, -np.inf, _front_scores(asked, documents, found, size))
        order = best_of(scores, kept)
        ids, scores = _taken(found, order), _taken(scores, order)
    for (before, _), (after, kept) in pairwise(stages):
        dots = scores / documents.inverse_lengths[ids, documents.level(before)]
        dots += _dots(asked, documents, ids, (before, after))
        scores = dots * documents.inverse_lengths[ids, documents.level(after)]
        order = best_of(scores, kept)
        ids, scores = _taken(ids, order), _taken(scores, order)
    scores = scores * queries.inverse_lengths[rows, queries.level(stages[-1][0])][:, None]
    order = np.argsort(-scores, axis=1, kind="stable")
    return _taken(ids, order), _taken(scores, order), counted * len(asked)


def _taken(values: NDArray[Any], order: Ids) -> NDArray[Any]:
    """Return each row's values in that row's order."""
    return np.take_along_axis(values, order, axis=1)


def _front_scores(asked: Floats, documents: Vectors, ids: Ids, size: int) -> Floats:
    """Return the products with normalised prefixes, [queries, candidates].

    Rows are taken out of the short table, into a room that stays in the cache.
    """
    front = documents.front(size)
    out = np.empty(ids.shape, dtype=np.float32)
    step = max(1, min(len(ids), CACHED // (ids.shape[1] * size)))
    room = np.empty((step, ids.shape[1], size), dtype=np.float32)
    for at in range(0, len(ids), step):
        part = slice(at, at + step)
        copied = room[: len(ids[part])]
        # Rows that were not found, -1, are clipped to the first: the caller knows them.
        np.take(front, ids[part], axis=0, out=copied, mode="clip")
        np.matmul(copied, asked[part, :size, None], out=out[part, :, None])
    return out


def _dots(asked: Floats, documents: Vectors, ids: Ids, units: tuple[int, int]) -> Floats:
    """Return the products of the units between two sizes, [queries, candidates].

    Documents are copied for a few queries at a time, so that the copies stay in the cache.
    """
    a, b = units
    out = np.empty(ids.shape, dtype=np.float32)
    step = max(1, CACHED // (ids.shape[1] * (b - a)))
    for at in range(0, len(ids), step):
        part = slice(at, at + step)
        copied = documents.values[ids[part], a:b]
        np.matmul(copied, asked[part, a:b, None], out=out[part, :, None])
    return out
