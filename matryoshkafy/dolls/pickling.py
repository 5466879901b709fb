"""How pickle takes a doll or a sub-model apart: into words of a checkpoint, and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

# The words of checkpoints stand above the models that they describe, so they are looked up when a
# model is pickled and imported by nobody here.
WORDS = "matryoshkafy.files.pickles"


Reduced = tuple[Callable[..., nn.Module], tuple[object, ...]]


def reduced(model: nn.Module) -> Reduced:
    """Return what `__reduce__` has to: a function, and the arguments that it makes a model of."""
    words = import_module(WORDS)
    return words.revive, words.frozen(model)
