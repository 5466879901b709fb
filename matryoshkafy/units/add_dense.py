"""add_dense(): a sentence encoder gets a weight that writes its vector, which rotate turns."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from matryoshkafy.units.permute import OrderError


def add_dense(model: nn.Module) -> str:
    """Put a `Dense` that changes nothing behind the pooling of a SentenceTransformer, in place.

    The vector of most encoders comes out of a norm with a gain, on which no rotation can be exact.
    A matrix behind it can hold one: after `convert(model, scope="output")` and `rotate` its rows
    are the principal directions of the vectors, so that the first units say most. The model's own
    folder (`save_pretrained`) keeps it, and `SentenceTransformer(folder, truncate_dim=n)` cuts.

    Args:
        model: a `SentenceTransformer` whose last modules pool and may normalise; call it before
            `convert`. It grows by width times width numbers.

    Returns:
        The name of the new weight.

    Raises:
        OrderError: not a SentenceTransformer, or the width of its vector is not known.
    """
    width = getattr(model, "get_embedding_dimension", lambda: None)()
    if not isinstance(model, nn.Sequential) or not isinstance(width, int):
        raise OrderError(
            f"a {type(model).__name__} was given; expected a SentenceTransformer that knows the "
            "width of its vector. Of any other model give convert "
            "torch.nn.Sequential(model, torch.nn.Linear(width, width))"
        )
    place = len(model)
    while place > 1 and type(model[place - 1]).__name__ == "Normalize":
        place -= 1
    model.insert(place, _identity(model, width))
    return f"{place}.linear.weight"


def _identity(model: nn.Module, width: int) -> nn.Module:
    try:
        library = import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError:  # before version 6
        library = import_module("sentence_transformers.models")
    like = next(model.parameters())
    dense: Any = library.Dense(width, width, bias=False, activation_function=nn.Identity())
    dense.linear.weight = nn.Parameter(torch.eye(width))
    return dense.to(like.device, like.dtype).train(model.training)
