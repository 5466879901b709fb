"""Where a target stands among all scores, at every size: NDCG, Recall and MRR in expectation.

Items with the target's score are ranked by expectation: the target is equally likely at each of
their places, so that a model that scores everything alike gets what chance gives, not 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matryoshkafy.serving.vectors import ServingError

Places = NDArray[np.float64]
GAINS: Mapping[str, Callable[[Places], Places]] = {
    "NDCG": lambda rank: 1 / np.log2(rank + 1.0),
    "Recall": lambda rank: np.ones_like(rank, dtype=np.float64),
    "MRR": lambda rank: 1 / rank,
}


@dataclass(frozen=True)
class Ranks:
    """Items above each target and items level with it, [B] each; `above` < 0 means a miss."""

    above: Tensor
    level: Tensor


@dataclass(frozen=True)
class Banned:
    """Items that must not be ranked: pairs of a row of the batch and an item, none twice.

    Args:
        rows: int64 [N], rows of the batch.
        items: int64 [N], the item of each.
    """

    rows: Tensor
    items: Tensor


def metrics_by_size(
    scores: Mapping[int, Tensor] | Iterable[tuple[int, Tensor]],
    target: Tensor,
    *,
    cutoffs: Sequence[int] = (10,),
    banned: Banned | None = None,
) -> dict[int, dict[str, float]]:
    """Return {size: {"NDCG@10": mean, "Recall@10": ..., "MRR@10": ...}} over a batch of targets.

    Args:
        scores: {size: [B, V]}, or pairs of both, such as `outputs.scores_at` yields: then one size
            is stored at a time.
        target: int64 [B], the item that came next.
        cutoffs: how many items are looked at.
        banned: items that must not be ranked, such as those that a user had; a target among them
            is a miss.

    Raises:
        ServingError: where scores and targets do not fit each other, or a score is NaN.
    """
    found: dict[int, dict[str, float]] = {}
    for size, table in _pairs(scores):
        _check(size, table, target)
        ranks = rank(table, target)
        ranks = ranks if banned is None else without(ranks, table, target, banned)
        found[size] = {name: sum_ / len(target) for name, sum_ in gains(ranks, cutoffs).items()}
    return found


def _pairs(
    scores: Mapping[int, Tensor] | Iterable[tuple[int, Tensor]],
) -> Iterable[tuple[int, Tensor]]:
    if isinstance(scores, Mapping):
        return cast("Mapping[int, Tensor]", scores).items()
    return scores


def _check(size: int, scores: Tensor, target: Tensor) -> None:
    if scores.ndim != 2 or target.shape != scores.shape[:1] or not len(target):
        raise ServingError(
            f"size {size} has scores {list(scores.shape)} for targets {list(target.shape)}; "
            "expected [batch, items] and [batch], such as outputs.scores_at(rows, last) gives"
        )
    if torch.isnan(scores).any():
        raise ServingError(f"size {size} has scores that are NaN; look at the training loss first")


def rank(scores: Tensor, target: Tensor) -> Ranks:
    """Count the items above and level with each target: scores [B, V], target [B]."""
    own = scores.gather(1, target.unsqueeze(1))
    # Two comparisons with 32-bit sums: a tenth of the time of sorting or of 64-bit sums.
    above = (scores > own).sum(1, dtype=torch.int32)
    return Ranks(above, (scores >= own).sum(1, dtype=torch.int32) - above - 1)


def without(ranks: Ranks, scores: Tensor, target: Tensor, banned: Banned) -> Ranks:
    """Take the banned items out of `ranks`; a target that is banned itself becomes a miss."""
    own = scores.gather(1, target.unsqueeze(1)).squeeze(1)[banned.rows]
    theirs = scores[banned.rows, banned.items]
    is_target = banned.items == target[banned.rows]
    counts = [
        torch.bincount(banned.rows[chosen], minlength=len(target))
        for chosen in (theirs > own, (theirs == own) & ~is_target, is_target)
    ]
    above = (ranks.above - counts[0]).masked_fill(counts[2] > 0, -1)
    return Ranks(above, ranks.level - counts[1])


def gains(ranks: Ranks, cutoffs: Sequence[int]) -> dict[str, float]:
    """Sum each metric over the targets, in expectation over the order of equal scores."""
    above, level = ranks.above.cpu().numpy(), ranks.level.cpu().numpy()
    hit = above >= 0
    above, level = above[hit], level[hit]
    return {
        f"{name}@{cutoff}": float(_expected(gain, cutoff, above, level).sum())
        for name, gain in GAINS.items()
        for cutoff in cutoffs
    }


def _expected(
    gain: Callable[[Places], Places],
    cutoff: int,
    above: NDArray[np.int64],
    level: NDArray[np.int64],
) -> Places:
    """The mean gain over the places above + 1 .. above + 1 + level, as a difference of sums."""
    summed = np.concatenate([[0.0], np.cumsum(gain(np.arange(1, cutoff + 1, dtype=np.float64)))])
    first, last = np.minimum(above, cutoff), np.minimum(above + level + 1, cutoff)
    return (summed[last] - summed[first]) / (level + 1)
