"""The tail of a model that ends in one linear, before that linear is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """The logits of size s are scale * hidden[..., :n] @ table[:, :n].T + bias, n = widths[s].

    hidden [..., D] is the full-width trunk value that enters the last linear, table [V, D], bias
    [V] or None, and widths gives the number of leading units of D for each size.
    """

    hidden: Tensor
    table: Tensor
    bias: Tensor | None
    widths: Mapping[int, int]
    scale: float = 1.0

    @property
    def scaled(self) -> Tensor:
        """hidden * scale."""
        return self.hidden if self.scale == 1 else self.hidden * self.scale

    def logits(self, size: int) -> Tensor:
        """The logits [..., V] of a size, stored in full."""
        width = self.widths[size]
        return F.linear(self.scaled[..., :width], self.table[:, :width], self.bias)
