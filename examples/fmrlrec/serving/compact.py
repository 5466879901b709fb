"""One size of a trained run as a plain recommender that holds the projected table of items.

A slice of a model over features keeps the features, since training needs them. To recommend, the
table at its size is enough: at an eighth of the width a fraction of the bytes. The plain class also
goes step by step, which a traced graph does not.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.fmrlrec.config import Config, RunError
from examples.fmrlrec.data import Dataset
from examples.fmrlrec.model import Recommender, Shape

CLOSE = 1e-4


class NestedNorm(nn.Module):
    """The norm of masked nesting: each block of units by its own statistics, or its prefix's."""

    def __init__(self, norm: nn.LayerNorm, edges: list[int], *, prefix: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.blocks = [(0 if prefix else a, a, b) for a, b in itertools.pairwise(edges)]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        parts = [
            functional.layer_norm(x[..., start:b], (b - start,), eps=self.eps)[..., a - start :]
            for start, a, b in self.blocks
        ]
        return torch.cat(parts, dim=-1) * self.weight + self.bias


def compact(doll: Any, config: Config, size: int) -> Recommender:
    """Returns one size of a doll as a plain recommender with a table of its own.

    Raises:
        RunError: it does not score as the slice does (a model other than the example's own).
    """
    import matryoshkafy as mk

    if size not in doll.sizes:
        raise RunError(f"size {size} was asked for; the run has the sizes {doll.sizes}")
    part = mk.slice(doll, size).eval()
    state = part.state_dict()
    table = item_table(state)
    model = Recommender(Shape(len(table) - 1, size, config.blocks))
    rest = {name: value for name, value in state.items() if not name.startswith("items.")}
    model.load_state_dict({**rest, "items.weight": table})
    if config.nesting == "masked":
        _mask(model, [rung for rung in doll.sizes if rung <= size], config.norm)
    _compare(model.eval(), part, len(table))
    return model


def item_table(state: dict[str, Tensor]) -> Tensor:
    """The table [items + 1, size] of a slice's weights: its own, or the features projected."""
    if "items.weight" in state:
        return state["items.weight"]
    weight, bias = state["items.project.weight"], state["items.project.bias"]
    return functional.linear(state["items.features"], weight, bias)


def project(doll: Any, size: int, features: np.ndarray) -> np.ndarray:
    """Rows [n, size] of the table for features [n, F] of items that were not trained on."""
    state = doll.state_dict()
    if "items.project.weight" not in state:
        raise RunError("this run knows items by id alone; new ones need texts or pictures")
    weight, bias = state["items.project.weight"][:size], state["items.project.bias"][:size]
    return functional.linear(torch.from_numpy(features), weight.cpu(), bias.cpu()).numpy()


def export_items(model: Recommender, data: Dataset, folder: Path) -> list[Path]:
    """Writes the table, ids and titles of a size as files that other systems read.

    The score of an item for a hidden state h is vector . h + bias. `scored` vectors have the bias
    as one unit more, so that an inner product with [h, 1] is the score: these are in the indexes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vectors, bias = rows_of(model)
    scored = np.concatenate([vectors, bias[:, None]], axis=1)
    ids = data.catalogue["item_id"].cast(pl.String)
    titles = pl.Series("title", titles_of(data)[1:])
    columns = {"item_id": ids, "title": titles, "vector": vectors, "bias": bias}
    pl.DataFrame(columns).write_parquet(folder / "items.parquet")
    save_file({"vectors": vectors, "bias": bias}, folder / "items.safetensors",
              {"size": str(vectors.shape[1])})  # fmt: skip
    np.save(folder / "items.npy", vectors)
    names = {"item_id": ids.to_list(), "title": titles.to_list()}
    (folder / "items.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    _write_indexes(scored, folder)
    return sorted(folder.iterdir())


def rows_of(model: Recommender) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [items, size] and biases [items] of all items, padding left out."""
    table = model.items().detach()[1:]
    return np.ascontiguousarray(table.float().numpy()), model.bias.detach()[1:].float().numpy()


def titles_of(data: Dataset) -> list[str]:
    """A name for every item, by number; 0 is the padding."""
    table = data.catalogue
    names = table["title"].fill_null("").to_list() if "title" in table.columns else []
    names = names or [""] * table.height
    return ["(padding)", *(t or f"item {i}" for t, i in zip(names, table["item_id"], strict=True))]


def _write_indexes(scored: np.ndarray, folder: Path) -> None:
    """By FAISS and by usearch, each where it is installed."""
    try:
        import faiss
    except ImportError:
        print("note: no items.faiss: pip install faiss-cpu")
    else:
        index = faiss.IndexHNSWFlat(scored.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
        index.add(scored)
        faiss.write_index(index, str(folder / "items.faiss"))
    try:
        from usearch.index import Index
    except ImportError:
        print("note: no items.usearch: pip install usearch")
    else:
        found = Index(ndim=scored.shape[1], metric="ip", dtype="f32")
        # One thread: rows that are added at the same time can miss each other.
        found.add(np.arange(len(scored)), scored, threads=1)
        found.save(str(folder / "items.usearch"))


def _levels(width: int, sizes: list[int]) -> Tensor:
    """Which size each unit of a width belongs to."""
    edges = torch.tensor([-(-width * size // sizes[-1]) for size in sizes])
    return torch.bucketize(torch.arange(width), edges, right=True)


@torch.no_grad()
def _mask(model: Recommender, sizes: list[int], norm: str) -> None:
    """Zeroes what smaller sizes do not read, and gives each block the norm that it has."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows, columns = (_levels(width, sizes) for width in module.weight.shape)
            module.weight *= rows[:, None] >= columns
    for parent in [model, *model.blocks]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, NestedNorm(child, [0, *sizes], prefix=norm == "prefix"))


@torch.no_grad()
def _compare(model: Recommender, part: nn.Module, items: int) -> None:
    sequences = torch.randint(1, items, (3, 7), generator=torch.Generator().manual_seed(0))
    sequences[0, :3] = 0
    expected, found = part(sequences)[:, 3:], model(sequences)[:, 3:]
    gap = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not gap < CLOSE:
        raise RunError(
            f"the plain model of this size scores unlike its slice (relative gap {gap:.1e}, "
            f"at most {CLOSE:.0e}); use the slice itself, by matryoshkafy.load"
        )
