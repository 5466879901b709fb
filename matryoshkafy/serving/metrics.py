"""How good a ranking is: recall, MRR and NDCG of the documents that are relevant."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def recall_of(ids: Ids, relevant: Ids) -> float:
    """Return the mean share of each query's relevant documents that stand in its ranking.

    Args:
        ids: int64 [queries, k].
        relevant: int64 [queries] (one each) or [queries, r].
    """
    wanted = np.reshape(relevant, (len(ids), -1))
    return float((wanted[:, :, None] == ids[:, None, :]).any(axis=2).mean())


def reciprocal_rank_of(ids: Ids, relevant: Ids) -> float:
    """Return MRR@k: the mean of 1 / rank of the one relevant document, 0 where it is not found.

    Args:
        ids: int64 [queries, k], best first.
        relevant: int64 [queries].
    """
    return float((1.0 / _ranks(ids, relevant)).mean())


def ndcg_of(ids: Ids, relevant: Ids) -> float:
    """Return NDCG@k with one relevant document a query: mean of 1 / log2(1 + rank).

    Args:
        ids: int64 [queries, k], best first.
        relevant: int64 [queries].
    """
    return float((1.0 / np.log2(1.0 + _ranks(ids, relevant))).mean())


def _ranks(ids: Ids, relevant: Ids) -> NDArray[np.float64]:
    """Return the place of each query's relevant document, from 1; infinite where it is missing."""
    hits = ids == np.reshape(relevant, (-1, 1))
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, np.inf)
