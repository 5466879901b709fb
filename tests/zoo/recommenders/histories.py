"""Example histories of the published recommenders: ids, 0 in front where a history is short."""

from __future__ import annotations

import torch

from tests.zoo import inputs as given

ITEMS = 97
FAMILY = "published recommenders"


def histories(batch: int = given.BATCH, length: int = given.LENGTH) -> torch.Tensor:
    """Draw ids; the second history begins with two paddings."""
    ids = given.tokens(batch, length)
    ids[1, :2] = 0
    return ids


def lengths(history: torch.Tensor) -> torch.Tensor:
    """Return how many items each history holds."""
    return (history > 0).sum(1)
