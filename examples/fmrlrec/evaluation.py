"""Ranking metrics over all items, for every size at once, under both protocols in use.

`all` ranks every item (published fMRLRec), `unseen` every item not in the user's history (published
LRURec; a target that is in the history cannot be recommended and is a miss). Items with the
target's score are ranked by expectation: the target is equally likely at each of their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from examples.fmrlrec.config import Config, RunError
from examples.fmrlrec.data import HELD_OUT, PADDING, Batch, Dataset, evaluation_batches
from matryoshkafy.serving.ranks import GAINS as GAINS
from matryoshkafy.serving.ranks import Banned, gains, rank, without

CUTOFFS = (5, 10, 20, 50)
PROTOCOLS = ("all", "unseen")

Scorer = Callable[[Tensor], Iterable[tuple[str, Tensor]]]
Table = dict[str, dict[str, float]]


def evaluate(
    scorer: Scorer, data: Dataset, split: str, config: Config, *, device: str = "cpu"
) -> dict[str, Table]:
    """Returns {size: {protocol: {metric: value}}} on "validation" or "test".

    `scorer` takes sequences [B, T] and yields (size, scores [B, items + 1]) for each size.
    """
    count = int((np.diff(data.offsets) >= 3).sum())
    found: dict[str, Table] = {}
    for batch in evaluation_batches(data, split, config):
        sequences = torch.from_numpy(batch.inputs).to(device)
        banned = banned_items(data, batch, split, device)
        target = torch.from_numpy(batch.targets).to(device)
        for size, scores in scorer(sequences):
            # A sum is finite only where its terms are, and costs a fortieth of looking at each.
            if not torch.isfinite(scores[:, 1:].sum(1)).all():
                raise RunError(f"size {size} gives scores that are not finite; lower --set lr=...")
            counted, table = rank(scores, target), found.setdefault(size, {})
            for protocol, items in banned.items():
                gained = gains(without(counted, scores, target, items), CUTOFFS)
                before = table.get(protocol, dict.fromkeys(gained, 0.0))
                table[protocol] = {n: before[n] + value / count for n, value in gained.items()}
    return found


def banned_items(data: Dataset, batch: Batch, split: str, device: str) -> dict[str, Banned]:
    """What each protocol leaves out for a batch: padding, and for "unseen" the history too."""
    histories = [data.sequence(user)[: -HELD_OUT[split]] for user in batch.users]
    parts = [np.unique(np.append(history, PADDING)) for history in histories]
    rows = np.arange(len(parts))
    owners = rows.repeat([len(part) for part in parts])
    pairs = {"all": (rows, rows * PADDING), "unseen": (owners, np.concatenate(parts))}
    return {n: Banned(*torch.from_numpy(np.array(p)).to(device)) for n, p in pairs.items()}


def module_scorer(model: torch.nn.Module, name: str) -> Scorer:
    """A scorer of any module that maps sequences [B, T] to scores [B, T, items + 1]."""
    return lambda sequences: [(name, model(sequences)[:, -1])]


def popularity_scorer(counts: np.ndarray) -> Scorer:
    """The baseline that gives everybody the most frequent items; `counts` [items + 1]."""
    row = torch.from_numpy(counts).double()
    return lambda x: [("popularity", row.to(x.device).expand(len(x), -1))]
