"""Batches as a user has them: a tensor, arguments, keywords, or a pair of both."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.graph.copies import forked, seed_torch
from matryoshkafy.graph.holders import holds


def arguments_of(batch: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments and keywords of a batch.

    Args:
        batch: a tensor or an object that holds some (the one argument), a mapping (keywords), a
            pair (tuple of arguments, mapping of keywords), or a sequence of arguments.
    """
    if isinstance(batch, Mapping):
        return (), dict(cast("Mapping[str, object]", batch))
    if isinstance(batch, Tensor) or holds(batch):
        return (batch,), {}
    parts = tuple(cast("Sequence[object]", batch))
    if len(parts) == 2 and isinstance(parts[0], tuple) and isinstance(parts[1], Mapping):
        args, kwargs = cast("tuple[tuple[object, ...], Mapping[str, object]]", parts)
        return args, dict(kwargs)
    return parts, {}


def moved(batch: object, doll: Doll) -> Any:
    """Return a batch, or what a teacher said of it, where the doll's weights are.

    A doll on the CPU gets the batch itself. A tokenizer's output stays one; another mapping of a
    class of its own becomes a plain one.
    """
    device = next(doll.parameters()).device
    if device.type == "cpu":
        return batch
    if isinstance(batch, Mapping):
        own = copy.copy(cast("Any", batch))
        if hasattr(own, "to"):
            return own.to(device)
        batch = dict(own)

    def there(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if holds(leaf) and hasattr(leaf, "to") else leaf

    return pytree.tree_map(there, batch)


def flat_inputs(doll: Doll, batch: object) -> list[Tensor]:
    """Return the flat inputs of the doll's graph for a batch, where its weights are."""
    args, kwargs = arguments_of(moved(batch, doll))
    return trace_of(doll).signature.flatten(args, kwargs)


def run_graph(doll: Doll, graph: fx.Graph, flat: list[Tensor]) -> list[Any]:
    """Return the flat outputs of a graph over the doll's state, without gradients.

    Every run draws the same random numbers, so that two runs differ by the state alone.
    """
    with torch.no_grad(), forked():
        seed_torch(0)
        root = root_of(doll)
        return fx.Interpreter(root, graph=graph).run(*flat, enable_io_processing=False)
