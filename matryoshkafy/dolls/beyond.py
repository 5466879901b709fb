"""beyond(): what lies past the prefix of a size neither learns from it nor moves what it learns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from matryoshkafy.dolls.doll import Doll, root_of
from matryoshkafy.dolls.measure import Written, cut_tensors, gradients_of, run
from matryoshkafy.dolls.slice import state_of


def beyond(written: Written, noisy: Doll, level: int, flat: Sequence[Any]) -> float:
    """Return how far the gradients of a size are from those of its prefix alone.

    Args:
        written: the doll, with its graphs.
        noisy: a copy of it with noise past the prefix.
        level: of the size.
        flat: the flat inputs of its graphs.

    Returns:
        The largest gradient of an entry that the size does not keep, or the largest change, under
        the noise, of the gradient of one that it keeps; relative to the largest gradient.

    Raises:
        GradientsError: the backward fails.
    """
    kept = {name: keep for name, _, keep in cut_tensors(written.doll, written.plan, level)}
    graph = written.at(level)
    own, moved = (_gradients(d, graph, kept, flat) for d in (written.doll, noisy))
    scale = max(map(_largest, own.values()), default=0.0)
    worst = 0.0
    for name, keep in kept.items():
        if name in own:
            change = torch.where(own[name] == moved[name], 0, own[name] - moved[name])
            worst = max(worst, _largest(own[name][~keep]), _largest(change[keep]))
    return worst / max(scale, 1e-30)


def _gradients(
    doll: Doll, graph: fx.Graph, names: Collection[str], flat: Sequence[Any]
) -> Mapping[str, Tensor]:
    """Return the gradients of a graph's outputs by name; zeros where none reaches."""
    state = state_of(doll)
    weights = {n: state[n] for n in names if state[n].requires_grad}
    with torch.enable_grad():
        found = gradients_of(run(graph, root_of(doll), list(flat)), weights)
    return {n: found.get(n, torch.zeros_like(t)) for n, t in weights.items()} if found else {}


def _largest(values: Tensor) -> float:
    """Return the largest magnitude; NaN counts as infinite."""
    found = float(values.abs().max()) if values.numel() else 0.0
    return found if found == found else float("inf")
