"""What a model file takes from a file beside it: a configuration, a base class, a function."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Config:
    """Says how wide a model is."""

    units: int

    @property
    def rescale(self) -> float:
        """What the values are multiplied by."""
        return math.sqrt(3 / self.units)


class Base(nn.Module):
    """Holds what its classes scale by."""

    def setup(self, width: int) -> None:
        """Compute the scale of `width` units."""
        self.scale = (width / 2) ** -0.5


class Scaled(nn.Module):
    """Multiplies by what it was made with."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]"""
        return x * self.by


def scale_of(units: int) -> float:
    """A number of a width."""
    return 2.5 / units
