"""The next items of a user or of a sequence, at every size, among them items never trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from examples.fmrlrec import data, encoders, formats
from examples.fmrlrec.config import DataError
from examples.fmrlrec.pipeline import Material, Run
from examples.fmrlrec.serving.compact import project, titles_of


@dataclass(frozen=True)
class NewItems:
    """Items that came after training: titles, and the encoders' features [n, F] of each."""

    titles: list[str]
    features: np.ndarray


def history_of(material: Material, user: str) -> np.ndarray:
    """Everything that a user had, by the user's id in the data."""
    ids = material.data.user_ids.cast(str).to_list()
    if user not in ids:
        raise DataError(f"no user {user!r}; the data has {len(ids)} users, such as {ids[:5]}")
    return material.data.sequence(ids.index(user))


def history_from(material: Material, items: list[str]) -> np.ndarray:
    """A sequence of item ids as numbers; unknown ids are named."""
    ids = {str(name): i for i, name in enumerate(material.data.catalogue["item_id"], start=1)}
    unknown = [item for item in items if item not in ids]
    if unknown or not items:
        raise DataError(f"no item {', '.join(unknown) or 'given'}; ids are like {list(ids)[:5]}")
    return np.asarray([ids[item] for item in items], dtype=np.int32)


def new_items(run: Run, material: Material, path: Path) -> NewItems:
    """Reads a table of items (as items.csv) and encodes it with what the catalogue taught."""
    if not path.is_file():
        raise DataError(f"no table of items at {path}; expected CSV or parquet with title, image")
    try:
        parquet = path.suffix == ".parquet"
        table = pl.read_parquet(path) if parquet else formats.scan_csv([path]).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} is neither CSV nor parquet that can be read: {error}") from error
    return encode_items(run, material, table.to_dicts(), path.parent)


def encode_items(run: Run, material: Material, rows: list[dict[str, Any]], root: Path) -> NewItems:
    """Titles and features of items described as rows with the columns of items.csv."""
    texts = {name: [formats.text(row.get(name)) or None for row in rows] for name in formats.ITEMS}
    table = pl.DataFrame(texts, schema=dict.fromkeys(formats.ITEMS, pl.String))
    table = table.with_columns(data.image_path(root))
    cache = run.folder / "cache"
    features = encoders.encode_new(table, material.data.catalogue, run.config, cache)
    if features is None:
        raise DataError("this run knows items by id alone; new ones need --set modality=both")
    empty = np.flatnonzero(~features.any(axis=1))
    if empty.size:
        raise DataError(
            f"new item {empty[0] + 1} has no picture that can be read, and no text or none with a "
            "word of the catalogue's"
        )
    names = [
        row["title"] or f"item {row['item_id'] or n}" for n, row in enumerate(table.to_dicts())
    ]
    return NewItems(names, features)


def recommend(
    doll: Any, material: Material, history: np.ndarray, *, count: int = 10, length: int = 50,
    new: NewItems | None = None,
) -> pl.DataFrame:  # fmt: skip
    """The `count` best items not in `history` for each size, best first, by title.

    New items compete with the trained ones: their rows of the table are projected features, their
    bias is the median one. They are marked.
    """
    sequence = torch.from_numpy(data.left_pad([history], min(length, max(2, len(history)))))
    titles, columns = titles_of(material.data), {}
    if new is not None:
        titles = [*titles, *(f"{title} (new)" for title in new.titles)]
    with torch.inference_mode():
        for size, scores in _scores(doll.eval(), sequence, new):
            scores[[0, *history.tolist()]] = -torch.inf
            best = scores.topk(min(count, len(scores)))
            kept = best.indices[best.values > -torch.inf].tolist()
            columns[f"size {size}"] = [titles[i] for i in kept]
    return pl.DataFrame(columns).with_row_index("rank", offset=1)


def _scores(doll: Any, sequence: Tensor, new: NewItems | None) -> Iterator[tuple[int, Tensor]]:
    """Scores [items + 1 + new items] of each size after one sequence."""
    outputs = doll.outputs(sequence)
    for size in outputs:
        trained = outputs[size][0, -1]
        if new is None:
            yield size, trained.clone()
            continue
        readout = outputs.readout_at(size)
        hidden, bias = readout.scaled[0, -1, : readout.widths[size]], readout.bias
        rows = torch.from_numpy(project(doll, size, new.features))
        yield size, torch.cat((trained, rows @ hidden + bias[1:].median()))
