"""Losses over all sizes at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """A tail that is one linear: the logits of size s are scale * hidden[:, :n] @ table[:, :n].T + bias.

    hidden [..., D] is the full-width trunk value, table [V, D], bias [V] or None, and widths gives
    n, the number of leading units of D, for each size.
    """

    hidden: Tensor
    table: Tensor
    bias: Tensor | None
    widths: Mapping[int, int]
    scale: float = 1.0
