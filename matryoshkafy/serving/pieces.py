"""A value that lies in pieces, one a level: which units each holds, and a product with all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from matryoshkafy.axes.dims import Segments, merged


def summed(parts: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Return `linear` of a value that lies in parts, with the columns of the weight for each."""
    out = linear(parts[0], weights[0], bias)
    flat = out.view(-1, out.shape[-1])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        # In place, so under autocast in the type that it chose.
        flat.addmm_(part.reshape(-1, part.shape[-1]).to(out.dtype), weight.t().to(out.dtype))
    return out


def order_of(groups: Sequence[Segments]) -> Segments:
    """Return the pieces of groups laid side by side that, in turn, stand in natural order."""
    starts: dict[int, tuple[int, int]] = {}
    at = 0
    for a, b in (segment for group in groups for segment in group):
        starts[a] = (at, at + b - a)
        at += b - a
    return merged(starts[start] for start in sorted(starts))
