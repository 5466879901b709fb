"""The order in which the rows of a data set are seen; it follows from seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from matryoshkafy.training.resuming import batches

POOL = 32  # batches whose rows are sorted by length together


def alike(
    lengths: Sequence[int], batch: int, *, seed: int, epoch: int, start: int = 0
) -> Iterator[Tensor]:
    """Yield the indices of each batch of an epoch from batch `start` on, rows of a length together.

    Pools of `POOL` batches are drawn at random and sorted by length; their batches are then drawn
    in random order, so that little is padded and a batch is still a random one among its kind.
    """
    known = torch.as_tensor(lengths)
    drawn = list(batches(len(known), batch * POOL, seed=seed, epoch=epoch))
    ordered = [rows[known[rows].argsort(stable=True)] for rows in drawn]
    full = [part for rows in ordered for part in torch.split(rows, batch) if len(part) == batch]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1)
    places = torch.randperm(len(full), generator=generator)
    order = cast("list[int]", places.tolist())  # pyright: ignore[reportUnknownMemberType]
    for i in order[start:]:
        yield full[i]
