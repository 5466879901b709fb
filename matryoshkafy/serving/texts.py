"""Texts as nested vectors: a sentence-transformers folder encodes a column, once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshkafy.serving.vectors import ServingError, Vectors, digest_of


def load_encoder(folder: str | os.PathLike[str]) -> Any:
    """Return the `SentenceTransformer` of a folder; raises `ServingError` where there is none."""
    path = Path(folder)
    if not (path / "modules.json").is_file():
        raise ServingError(
            f"{path} is no sentence-transformers folder (it has no modules.json); give the folder "
            "of an encoder, such as one that slice --to st wrote"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ServingError(
            'encoding texts needs sentence-transformers: pip install "matryoshkafy[hf]"'
        ) from error
    return SentenceTransformer(str(path), device="cpu")


def encode(
    encoder: Any,
    texts: Sequence[str],
    sizes: Sequence[int] | None = None,
    *,
    task: str | None = None,
) -> Vectors:
    """Return the vectors of texts, in the order of the texts.

    Args:
        encoder: a `SentenceTransformer`.
        texts: what to encode.
        sizes: the ladder; halves of the width down to 16 by default.
        task: "query" or "document" of an encoder with a part for each, see `save_router`.
    """
    calls = {None: "encode", "query": "encode_query", "document": "encode_document"}
    if task not in calls:
        raise ServingError(f'task={task!r} was given; expected "query", "document" or None')
    call = getattr(encoder, calls[task])
    values = call(list(texts), batch_size=64, convert_to_numpy=True, show_progress_bar=False)
    ladder = tuple(sizes) if sizes else halves(values.shape[1])
    return Vectors(np.asarray(values, dtype=np.float32), ladder, model_of(encoder))


def halves(width: int, least: int = 16) -> tuple[int, ...]:
    """Return width, width / 2, ... down to the least, ascending."""
    sizes = [width]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return tuple(sizes[::-1])


def model_of(encoder: Any) -> str:
    """Return the digest of an encoder's weights: the name that its vectors carry."""
    named = sorted(encoder.state_dict().items())
    return digest_of(*(t.detach().float().cpu().numpy() for _, t in named))
