"""Ranking metrics over all items, for every size at once, under both protocols in use.

`all` ranks every item (published fMRLRec), `unseen` every item not in the user's history (published
LRURec; a target that is in the history cannot be recommended and is a miss). Items with the
target's score are ranked by expectation: the target is equally likely at each of their places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from examples.fmrlrec.config import Config, RunError
from examples.fmrlrec.data import HELD_OUT, Batch, Dataset, evaluation_batches
from matryoshkafy.serving.ranks import GAINS as GAINS
from matryoshkafy.serving.ranks import Banned, gains, rank, without

CUTOFFS = (5, 10, 20, 50)
PROTOCOLS = ("all", "unseen")

Scorer = Callable[[Tensor], Iterator[tuple[str, Tensor]]]
Table = dict[str, dict[str, float]]


def evaluate(
    scorer: Scorer, data: Dataset, split: str, config: Config, *, device: str = "cpu"
) -> dict[str, Table]:
    """Returns {size: {protocol: {metric: value}}} on "validation" or "test".

    `scorer` takes sequences [B, T] and yields (size, scores [B, items + 1]) for each size.
    """
    count = int((np.diff(data.offsets) >= 3).sum())
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for batch in evaluation_batches(data, split, config):
        sequences = torch.from_numpy(batch.inputs).to(device)
        banned = banned_items(data, batch, split, device)
        target = torch.from_numpy(batch.targets).to(device)
        for size, scores in scorer(sequences):
            # A sum is finite only where its terms are, and costs a fortieth of looking at each.
            if not torch.isfinite(scores[:, 1:].sum(1)).all():
                raise RunError(f"size {size} gives scores that are not finite; lower --set lr=...")
            counted = rank(scores, target)
            for protocol, items in banned.items():
                ranks = without(counted, scores, target, items)
                found[size][protocol].append(gains(ranks, CUTOFFS))
    return {
        size: {
            protocol: {n: sum(part[n] for part in parts) / count for n in parts[0]}
            for protocol, parts in tables.items()
        }
        for size, tables in found.items()
    }


def banned_items(data: Dataset, batch: Batch, split: str, device: str) -> dict[str, Banned]:
    """What each protocol leaves out for a batch: padding, and for "unseen" the history too."""
    parts = [np.unique(data.sequence(user)[: -HELD_OUT[split]]) for user in batch.users]
    rows = torch.arange(len(parts))
    lengths = torch.tensor([len(part) for part in parts])
    padding = Banned(rows.to(device), torch.zeros_like(rows).to(device))
    owners = torch.repeat_interleave(rows, lengths).to(device)
    items = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
    both = torch.cat((padding.rows, owners)), torch.cat((padding.items, items))
    return {"all": padding, "unseen": Banned(*both)}


def module_scorer(model: torch.nn.Module, name: str) -> Scorer:
    """A scorer of any module that maps sequences [B, T] to scores [B, T, items + 1]."""
    return lambda sequences: iter([(name, model(sequences)[:, -1])])


def popularity_scorer(counts: np.ndarray) -> Scorer:
    """The baseline that gives everybody the most frequent items; `counts` [items + 1]."""
    row = torch.from_numpy(counts).double()
    return lambda sequences: iter(
        [("popularity", row.to(sequences.device).expand(len(sequences), -1))]
    )
