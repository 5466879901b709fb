"""A small shop with made-up features, shared by the tests that train."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.data import Dataset
from examples.fmrlrec.encoders import Features
from examples.fmrlrec.pipeline import Material

ITEMS, USERS = 40, 60
TINY = {
    "sizes": "2..8", "batch": 8, "epochs": 3, "lr": 1e-2, "warmup": 4, "dropout": 0.2,
    "max_length": 12, "checkpoint_steps": 3, "patience": 5, "windows": "all", "learn_scales": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Config:
    """Settings that train in a second."""
    return replace(Config(), TINY)


@pytest.fixture(scope="session")
def material() -> Material:
    """Users who walk along a fixed cycle of items, some further than others."""
    return cyclic_material()


def cyclic_material() -> Material:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 12, USERS)
    starts = random.integers(0, ITEMS, USERS)
    walks = [(s + np.arange(n)) % ITEMS + 1 for s, n in zip(starts, lengths, strict=True)]
    catalogue = pl.DataFrame(
        {"item_id": range(101, 101 + ITEMS), "title": [f"Thing {i}" for i in range(ITEMS)]}
    )
    data = Dataset(
        np.concatenate(walks).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        pl.Series("user_id", range(USERS)),
        catalogue,
        {},
    )
    vectors = random.normal(size=(2, ITEMS + 1, 6)).astype(np.float32)
    vectors[:, 0] = 0
    return Material(data, Features({"text": vectors[0], "image": vectors[1]}))
