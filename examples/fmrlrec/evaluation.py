"""Ranking metrics over all items, for every size at once, under both protocols in use.

`all` ranks every item (published fMRLRec), `unseen` every item not in the user's history (published
LRURec; a target that is in the history cannot be recommended and is a miss). Items with the
target's score are ranked by expectation: the target is equally likely at each of their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.fmrlrec.config import Config
from examples.fmrlrec.data import Batch, Dataset, evaluation_batches, histories
from examples.fmrlrec.errors import RunError

CUTOFFS = (5, 10, 20, 50)
PROTOCOLS = ("all", "unseen")
GAINS = {
    "NDCG": lambda rank: 1 / np.log2(rank + 1.0),
    "Recall": lambda rank: np.ones_like(rank, dtype=np.float64),
    "MRR": lambda rank: 1 / rank,
}  # fmt: skip

Scorer = Callable[[Tensor], Iterator[tuple[str, Tensor]]]
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Ranks:
    """Items above each target and items level with it, [B] each; `above` < 0 means a miss."""

    above: Tensor
    level: Tensor


@dataclass(frozen=True)
class Banned:
    """Items that must not be ranked: pairs of a row of the batch and an item, none twice."""

    rows: Tensor
    items: Tensor


def evaluate(
    scorer: Scorer, data: Dataset, split: str, config: Config, *, device: str = "cpu"
) -> dict[str, Table]:
    """Returns {size: {protocol: {metric: value}}} on "validation" or "test".

    `scorer` takes sequences [B, T] and yields (size, scores [B, items + 1]) for each size.
    """
    sums: dict[str, dict[str, list[dict[str, float]]]] = {}
    for batch in evaluation_batches(data, split, config):
        sequences = torch.from_numpy(batch.inputs).to(device)
        banned = banned_items(data, batch, split, device)
        target = torch.from_numpy(batch.targets).to(device)
        for size, scores in scorer(sequences):
            _check_finite(scores, size)
            for protocol, ranks in _protocols(scores, target, banned).items():
                sums.setdefault(size, {}).setdefault(protocol, []).append(gains(ranks))
    count = int((np.diff(data.offsets) >= 3).sum())
    return {
        size: {protocol: _mean(parts, count) for protocol, parts in table.items()}
        for size, table in sums.items()
    }


def rank(scores: Tensor, target: Tensor) -> Ranks:
    """Counts the items above and level with each target: scores [B, V], target [B]."""
    own = scores.gather(1, target.unsqueeze(1))
    # Two comparisons with 32-bit sums: a tenth of the time of sorting or of 64-bit sums.
    above = (scores > own).sum(1, dtype=torch.int32)
    return Ranks(above, (scores >= own).sum(1, dtype=torch.int32) - above - 1)


def without(ranks: Ranks, scores: Tensor, target: Tensor, banned: Banned) -> Ranks:
    """Takes the banned items out of `ranks`; a target that is banned itself becomes a miss."""
    own = scores.gather(1, target.unsqueeze(1)).squeeze(1)[banned.rows]
    theirs = scores[banned.rows, banned.items]
    is_target = banned.items == target[banned.rows]
    counts = [
        torch.bincount(banned.rows[chosen], minlength=len(target))
        for chosen in (theirs > own, (theirs == own) & ~is_target, is_target)
    ]
    above = (ranks.above - counts[0]).masked_fill(counts[2] > 0, -1)
    return Ranks(above, ranks.level - counts[1])


def gains(ranks: Ranks) -> dict[str, float]:
    """Sums each metric over the targets, in expectation over the order of equal scores."""
    above, level = ranks.above.cpu().numpy(), ranks.level.cpu().numpy()
    hit = above >= 0
    above, level = above[hit], level[hit]
    return {
        f"{name}@{cutoff}": float(_expected(gain, cutoff, above, level).sum())
        for name, gain in GAINS.items()
        for cutoff in CUTOFFS
    }


def banned_items(data: Dataset, batch: Batch, split: str, device: str) -> dict[str, Banned]:
    """What each protocol leaves out for a batch: padding, and for "unseen" the history too."""
    parts = [np.unique(part) for part in histories(data, batch.users, split)]
    rows = torch.arange(len(parts))
    lengths = torch.tensor([len(part) for part in parts])
    padding = Banned(rows.to(device), torch.zeros_like(rows).to(device))
    owners = torch.repeat_interleave(rows, lengths).to(device)
    items = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
    both = torch.cat((padding.rows, owners)), torch.cat((padding.items, items))
    return {"all": padding, "unseen": Banned(*both)}


def last_scores(sizes: Mapping[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields (size, scores at the last position [B, items + 1]) of {size: scores [B, T, V]}."""
    for size in sizes:
        yield str(size), sizes[size][:, -1]


def module_scorer(model: torch.nn.Module, name: str) -> Scorer:
    """A scorer of any module that maps sequences [B, T] to scores [B, T, items + 1]."""
    return lambda sequences: iter([(name, model(sequences)[:, -1])])


def popularity_scorer(counts: np.ndarray) -> Scorer:
    """The baseline that gives everybody the most frequent items; `counts` [items + 1]."""
    row = torch.from_numpy(counts).double()
    return lambda sequences: iter(
        [("popularity", row.to(sequences.device).expand(len(sequences), -1))]
    )


def _expected(
    gain: Callable[[np.ndarray], np.ndarray], cutoff: int, above: np.ndarray, level: np.ndarray
) -> np.ndarray:
    """The mean gain over the places above + 1 .. above + 1 + level, as a difference of sums."""
    summed = np.concatenate([[0.0], np.cumsum(gain(np.arange(1, cutoff + 1, dtype=np.float64)))])
    first, last = np.minimum(above, cutoff), np.minimum(above + level + 1, cutoff)
    return (summed[last] - summed[first]) / (level + 1)


def _protocols(scores: Tensor, target: Tensor, banned: dict[str, Banned]) -> dict[str, Ranks]:
    counted = rank(scores, target)
    return {name: without(counted, scores, target, items) for name, items in banned.items()}


def _check_finite(scores: Tensor, size: str) -> None:
    # A sum is finite only where its terms are, and costs a fortieth of looking at each of them.
    if not torch.isfinite(scores[:, 1:].sum(1)).all():
        raise RunError(f"size {size} gives scores that are not finite; lower --set lr=...")


def _mean(parts: list[dict[str, float]], count: int) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / count for name in parts[0]}
