"""Norms per level as operators: what runs, which shapes come out, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from matryoshkafy.kernels import norms
from matryoshkafy.kernels.dispatch import Context, Grads
from matryoshkafy.kernels.levels import bands_of, check_runs
from matryoshkafy.kernels.norms import Norm, Saved

if TYPE_CHECKING:
    from typing_extensions import Unpack

How = tuple[list[int], bool, bool]  # runs, prefix, centred
NormCall = tuple[float, list[int], bool]  # eps, runs, prefix
Inputs = tuple[Tensor, Tensor | None, Tensor | None, float, list[int], bool, bool]


class NormContext(Context, Protocol):
    """What a norm keeps."""

    runs: list[int]
    prefix: bool
    centred: bool
    bias_dtype: torch.dtype | None


def channels(x: Tensor) -> Tensor:
    """x [N, C, *spatial] as [N, C, S]."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def norm(  # noqa: PLR0913 - the operator's schema
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    runs: list[int],
    prefix: bool,
    centred: bool,
) -> norms.Triple:
    check_runs(runs, x.shape[1], "the normalised dim")
    return norms.forward(x, weight, bias, Norm(bands_of(tuple(runs)), eps, prefix, centred))


def norm_shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *args: Unpack[How]
) -> norms.Triple:
    runs, *_ = args
    check_runs(runs, x.shape[1], "the normalised dim")
    total = len(bands_of(tuple(runs)).pairs())
    stats = x.new_empty(x.shape[0], total, dtype=norms.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *args: Unpack[How]
) -> norms.Triple:
    runs, prefix, centred = args
    saved = Saved(x, weight, mean, rstd)
    return norms.backward(dy, saved, Norm(bands_of(tuple(runs)), 0.0, prefix, centred))


def norm_backward_shape(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *args: Unpack[How]
) -> norms.Triple:
    one = mean.new_empty(x.shape[1])
    return x.new_empty(x.shape), one, torch.empty_like(one)


def norm_setup(ctx: NormContext, inputs: Inputs, output: norms.Triple) -> None:
    x, weight, bias, _, ctx.runs, ctx.prefix, ctx.centred = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, weight, output[1], output[2])


def norm_autograd(ctx: NormContext, dy: Tensor, *_: Tensor) -> Grads:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dw, db = torch.ops.matryoshkafy.norm_backward(
        dy, x, weight, mean, rstd, ctx.runs, ctx.prefix, ctx.centred
    )
    dw = None if weight is None else dw.to(weight.dtype)
    db = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
    return dx, dw, db, None, None, None, None


def last_dim_norm(x: Tensor, *args: object) -> Tensor:
    """The norm over the last dim of x [..., C]."""
    flat = x.reshape(-1, x.shape[-1], 1)
    return torch.ops.matryoshkafy.norm(flat, *args)[0].view(x.shape)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Unpack[NormCall]
) -> Tensor:
    return last_dim_norm(x, weight, bias, *args, True)


def rms_norm(x: Tensor, weight: Tensor | None, *args: Unpack[NormCall]) -> Tensor:
    return last_dim_norm(x, weight, None, *args, False)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Unpack[NormCall]
) -> Tensor:
    y = torch.ops.matryoshkafy.norm(channels(x), weight, bias, *args, True)[0]
    return y.view(x.shape)
