"""Batches as a user has them: a tensor, arguments, keywords, or a pair of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from matryoshkafy.dolls.doll import Doll

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(batch: Any) -> Call:
    """Return the arguments and keywords of a batch.

    Args:
        batch: a tensor (the one argument), a mapping (keywords), a pair (tuple of arguments,
            mapping of keywords), or a sequence of arguments.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    pair = len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping)
    return (batch[0], dict(batch[1])) if pair else (tuple(batch), {})


def flat_inputs(doll: Doll, batch: Any) -> list[Any]:
    """Return the flat inputs of the doll's graph for a batch."""
    args, kwargs = call_of(batch)
    return doll._trace.signature.flatten(args, kwargs)


def run_graph(doll: Doll, graph: fx.Graph, flat: list[Any]) -> list[Any]:
    """Return the flat outputs of a graph over the doll's state, without gradients.

    Every run draws the same random numbers, so that two runs differ by the state alone.
    """
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        root = doll.__dict__["_root"]
        return fx.Interpreter(root, graph=graph).run(*flat, enable_io_processing=False)
