"""A small encoder for queries and a large one for documents, in one sentence-transformers folder.

Documents are encoded once, queries at every search, so the encoder of the queries is the one that
should be small. A size that was distilled towards the vectors of the large one shares its space up
to a linear map, which has a closed form.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshkafy.serving.texts import load_encoder
from matryoshkafy.serving.vectors import Floats, ServingError


def fit_projection(small: Floats, large: Floats, *, ridge: float = 1e-3) -> Floats:
    """Return the linear map from a small encoder's vectors to a large one's, by least squares.

    Args:
        small: float [texts, m], vectors of some texts by the small encoder.
        large: float [texts, D], vectors of the same texts by the large one.
        ridge: weight of the squared map, relative to the mean square of the small vectors.

    Returns:
        float [m, D]: `small @ map` is near `large`.

    Raises:
        ServingError: where the two have not as many rows, or fewer rows than units.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (small, large))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < a.shape[1]:
        raise ServingError(
            f"vectors of shapes {list(a.shape)} and {list(b.shape)} were given; expected one row a "
            f"text in both, and at least as many texts as the small vectors have units"
        )
    square = np.transpose(a) @ a
    damped = square + ridge * np.trace(square) / len(square) * np.eye(len(square))
    return np.asarray(np.linalg.solve(damped, np.transpose(a) @ b), dtype=np.float32)


def save_router(
    folder: str | os.PathLike[str],
    *,
    query: str | os.PathLike[str],
    document: str | os.PathLike[str],
    projection: Floats | None = None,
) -> None:
    """Write a sentence-transformers folder whose `encode_query` and `encode_document` differ.

    Args:
        folder: where to write; must not hold anything yet.
        query: the folder of the queries' encoder, such as one that `family` wrote for a size.
        document: the folder of the documents' encoder.
        projection: float [m, D] of `fit_projection`; needed where the two have other widths.

    Raises:
        ServingError: where the folder is taken, or the widths do not meet.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise ServingError(f"{target} is not empty; name a new folder")
    small, large = load_encoder(query), load_encoder(document)
    widths = _width(small), _width(large)
    wanted = None if projection is None else projection.shape
    if wanted != widths and (wanted is not None or widths[0] != widths[1]):
        raise ServingError(
            f"the queries' encoder gives {widths[0]} units, the documents' {widths[1]}, and the "
            f"projection has the shape {wanted}; expected a projection of the shape {widths}, see "
            "fit_projection"
        )
    kinds: Any = _modules()
    asked = list(small.children())
    if projection is not None:
        asked = [m for m in asked if not isinstance(m, kinds.Normalize)]
        asked += [_dense(kinds, projection), kinds.Normalize()]
    router = kinds.Router.for_query_document(asked, list(large.children()))
    sentence_transformers: Any = importlib.import_module("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(modules=[router], device="cpu")
    model.save(str(target), create_model_card=False)


def _width(encoder: Any) -> int:
    return int(encoder.encode(["width"]).shape[1])


def _dense(kinds: Any, projection: Floats) -> Any:
    into, out = projection.shape
    made = kinds.Dense(into, out, bias=False, activation_function=torch.nn.Identity())
    with torch.no_grad():
        made.linear.weight.copy_(torch.as_tensor(np.ascontiguousarray(np.transpose(projection))))
    return made


def _modules() -> Any:
    """The modules' place: sentence-transformers 6 moved it."""
    try:
        return importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError:
        return importlib.import_module("sentence_transformers.models")
