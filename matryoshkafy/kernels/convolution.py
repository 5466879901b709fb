"""Convolutions whose weight is block-triangular over its channel dims."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshkafy.kernels.levels import Runs, kept


@dataclass(frozen=True)
class Geometry:
    """The arguments of aten.convolution that are not tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def arguments(self) -> tuple:
        """In the order of aten.convolution."""
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )


def weight_mask(weight: Tensor, geometry: Geometry, out_runs: Runs, in_runs: Runs) -> Tensor:
    """The entries of a convolution's weight that are kept, broadcast over the kernel's dims."""
    keep = kept(out_runs, in_runs, weight.device)
    keep = keep.t() if geometry.transposed else keep
    keep = keep.repeat(geometry.groups, 1)
    return keep.view(*keep.shape, *[1] * (weight.ndim - 2))


def masked(weight: Tensor, geometry: Geometry, out_runs: Runs, in_runs: Runs) -> Tensor:
    """The weight with its structural zeros written out."""
    keep = weight_mask(weight, geometry, out_runs, in_runs)
    return weight.where(keep, weight.new_zeros(()))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    out_runs: Runs,
    in_runs: Runs,
) -> Tensor:
    """x [N, C, *spatial] -> [N, O, *spatial]."""
    weight = masked(weight, geometry, out_runs, in_runs)
    return torch.convolution(x, weight, bias, *geometry.arguments())


def grad_input(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, out_runs: Runs, in_runs: Runs
) -> Tensor:
    """dx, of the shape of x (whose values are not read)."""
    weight = masked(weight, geometry, out_runs, in_runs)
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry.arguments(), [True, False, False]
    )[0]


def grad_weight(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, out_runs: Runs, in_runs: Runs
) -> Tensor:
    """dW, zero at the structural zeros; weight gives the shape (its values are not read)."""
    dw = torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry.arguments(), [False, True, False]
    )[1]
    return masked(dw, geometry, out_runs, in_runs)
