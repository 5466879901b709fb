"""The generated shop is reproducible and each modality narrows the next choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from examples.fmrlrec import synthetic

SMALL = synthetic.Shop(items=1200, users=80, mean_length=10)


def test_same_seed_same_shop(tmp_path: Path) -> None:
    folders = [synthetic.generate(tmp_path / name, SMALL) for name in "ab"]
    for name in ("interactions.csv", "items.csv", "images/7.jpg"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_next_theme_follows_from_the_last(tmp_path: Path) -> None:
    folder = synthetic.generate(tmp_path, SMALL)
    items = pl.read_csv(folder / "items.csv").select("item_id", "categories")
    steps = pl.read_csv(folder / "interactions.csv").join(items, on="item_id")
    steps = steps.sort("user_id", "timestamp").with_columns(
        pl.col("categories").shift(-1).over("user_id").alias("next")
    )
    pairs = steps.drop_nulls().group_by("categories", "next").len().sort("len")
    likeliest = pairs.group_by("categories").agg(pl.col("len").max())["len"].sum()
    # By chance the most frequent of 20 themes would follow in about a tenth of the cases.
    assert likeliest / pairs["len"].sum() > 0.6


def test_pictures_tell_the_look() -> None:
    random = np.random.default_rng(0)
    drawn = {k: np.asarray(synthetic.draw(k, random), dtype=float) for k in range(5)}
    centres = [np.median(drawn[k][20:28, 20:28], (0, 1)) for k in range(5)]
    for k, colour in enumerate(synthetic.COLOURS):
        assert np.abs(centres[k] - colour).max() < 8
