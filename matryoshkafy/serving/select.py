"""best_of(): the k largest of each row, exactly, without partitioning whole rows.

A partition of 20,000 scores costs more than computing them from 48 units. So columns are first
taken in groups of sixteen: the k groups of largest maximum hold k largest scores (a score outside
of them is no larger than k others), and only those groups are partitioned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from matryoshkafy.serving.vectors import Floats

Ids = NDArray[np.int64]
GROUP = 16


def best_of(scores: Floats, k: int) -> Ids:
    """Return the columns of the k largest scores of each row, in no order.

    Args:
        scores: float [rows, columns].
        k: how many; all columns where there are no more.
    """
    rows, columns = scores.shape
    if k >= columns:
        return np.tile(np.arange(columns, dtype=np.int64), (rows, 1))
    groups = columns // GROUP
    if groups <= 2 * k:
        return _largest(scores, k)
    # Group g holds the columns g, g + groups, ...: maxima are then taken along whole lines.
    stacked = np.reshape(scores[:, : groups * GROUP], (rows, GROUP, groups))
    chosen = _largest(stacked.max(axis=1), k)
    inside = chosen[:, None, :] + groups * np.arange(GROUP, dtype=np.int64)[:, None]
    rest = np.broadcast_to(
        np.arange(groups * GROUP, columns, dtype=np.int64), (rows, columns - groups * GROUP)
    )
    ids = np.concatenate([np.reshape(inside, (rows, -1)), rest], axis=1)
    return np.take_along_axis(ids, _largest(np.take_along_axis(scores, ids, 1), k), axis=1)


def _largest(scores: Floats, k: int) -> Ids:
    columns = scores.shape[1]
    return np.argpartition(scores, columns - k, axis=1)[:, columns - k :].astype(np.int64)
