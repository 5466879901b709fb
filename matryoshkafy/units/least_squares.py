"""Least squares in closed form: a weight, or a gain unit by unit, with a bias where one is held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshkafy.kernels.untyped import solve


@dataclass(frozen=True)
class Affine:
    """What is fitted: y = x @ weight.t() + bias, or y = x * weight + bias of a vector."""

    weight: Tensor
    bias: Tensor | None


class Products:
    """Sums of products of inputs x [rows, p] and wanted outputs y [rows, q], streamed.

    `unitwise`: p is q, and only products of a unit with itself are kept.
    """

    def __init__(self, *, unitwise: bool) -> None:
        self.unitwise, self.rows = unitwise, 0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows; products in float32, their sums in float64 on the CPU."""
        x, y = x.float(), y.float()
        pair = (x.square().sum(0), (x * y).sum(0)) if self.unitwise else (x.t() @ x, x.t() @ y)
        each = (x.sum(0), y.sum(0), y.square().sum(0), *pair)
        wide = [one.cpu().double() for one in each]
        self.rows += len(x)
        self.sums = tuple(map(torch.add, self.sums, wide)) if self.sums else tuple(wide)

    def fitted(self, start: Affine, ridge: float, *, fixed: bool = False) -> Affine:
        """Return what comes nearest to the wanted outputs, drawn to the start by a ridge.

        The sum of squares plus `ridge` times the mean square of an input times |w - start|^2, so
        directions that the inputs hardly have stay what they were. `fixed`: the bias moves alone.
        """
        mean_x, mean_y, square, product, _ = self._moments(start)
        weight = start.weight.cpu().double()
        pull = ridge * (square if self.unitwise else square.diagonal()).mean().clamp_min(1e-30)
        if fixed:
            pass
        elif self.unitwise:
            weight = (product + pull * weight) / (square + pull)
        else:
            inner = square + pull * torch.eye(len(square), dtype=torch.float64)
            weight = weight + solve(inner, product - square @ weight.t()).t()
        bias = None if start.bias is None else mean_y - _applied(weight, mean_x)
        return Affine(weight, bias)

    def missed(self, affine: Affine) -> float:
        """Return the share of the variance of the wanted outputs that a map misses."""
        mean_x, mean_y, square, product, variance = self._moments(affine)
        weight = affine.weight.cpu().double()
        if self.unitwise:
            left = variance - 2 * weight * product + weight.square() * square
        else:
            inner = ((weight @ square) * weight).sum(1)
            left = variance - 2 * (weight * product.t()).sum(1) + inner
        if affine.bias is not None:
            left = left + (mean_y - _applied(weight, mean_x) - affine.bias.cpu().double()).square()
        return float(left.sum().clamp_min(0) / variance.sum().clamp_min(1e-30))

    def _moments(self, affine: Affine) -> tuple[Tensor, ...]:
        """Return means and second moments: about the means where a bias takes them up."""
        x, y, yy, square, product = (s / self.rows for s in self.sums)
        if affine.bias is None:
            return x, y, square, product, yy
        if self.unitwise:
            return x, y, square - x * x, product - x * y, yy - y * y
        return x, y, square - torch.outer(x, x), product - torch.outer(x, y), yy - y * y


def _applied(weight: Tensor, x: Tensor) -> Tensor:
    return weight @ x if weight.dim() == 2 else weight * x
