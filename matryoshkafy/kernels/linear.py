"""The block-triangular product: y = x W^T, its dx and its dW."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshkafy.kernels.levels import Runs, kept


def masked(weight: Tensor, out_runs: Runs, in_runs: Runs) -> Tensor:
    """weight [O, I] with its structural zeros written out."""
    return weight.where(kept(out_runs, in_runs, weight.device), weight.new_zeros(()))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_runs: Runs, in_runs: Runs
) -> Tensor:
    """x [N, I], weight [O, I] -> [N, O]."""
    return F.linear(x, masked(weight, out_runs, in_runs), bias)


def grad_input(dy: Tensor, weight: Tensor, out_runs: Runs, in_runs: Runs) -> Tensor:
    """dy [N, O], weight [O, I] -> dx [N, I]."""
    return dy @ masked(weight, out_runs, in_runs)


def grad_weight(dy: Tensor, x: Tensor, out_runs: Runs, in_runs: Runs) -> Tensor:
    """dy [N, O], x [N, I] -> dW [O, I], zero at the structural zeros."""
    return masked(dy.t() @ x, out_runs, in_runs)
