"""The block-triangular product: y = x W^T, its dx and its dW, by tiles of dense products.

The structural zeros outside of the tiles are never read, those inside of a masked tile are
overwritten in a copy of it. Products go straight into column ranges of the result: no
concatenation, no zero-padded intermediate.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshkafy.kernels.dispatch import Context, DoubleBackward, Grads
from matryoshkafy.kernels.levels import Runs, keep_mask, zero
from matryoshkafy.kernels.overflow import by_level, overflowed
from matryoshkafy.kernels.tiling import Tile, Tiling, span_of, tiling, zeros_of

Pair = tuple[Runs, Runs]


def as_rows(x: Tensor) -> Tensor:
    """x [..., I] as a matrix [N, I]."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _plan(x: Tensor, out_runs: Runs, in_runs: Runs) -> Tiling:
    """The tiles for the rows of x [N, ...]."""
    return tiling(out_runs, in_runs, x.shape[0].bit_length(), x.dtype, x.device.type)


def _block(weight: Tensor, tile: Tile, out_runs: Runs, in_runs: Runs) -> Tensor:
    """A tile of the weight, free of garbage."""
    part = tile.of(weight)
    if not tile.masked:
        return part
    return part.masked_fill(zeros_of(out_runs, in_runs, tile, weight.device), 0)


def strided(x: Tensor) -> Tensor:
    """x [N, K] in a layout that a product reads without copying it each time."""
    return x if 1 in x.stride() and 0 not in x.stride() else x.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_runs: Runs, in_runs: Runs
) -> Tensor:
    """x [N, I], weight [O, I] -> [N, O]."""
    x, runs = strided(x), (out_runs, in_runs)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for strip in _plan(x, *runs).strips:
        part = span_of(y, 1, strip.rows)
        start = None if bias is None else span_of(bias, 0, strip.rows)
        if not strip.tiles:
            part.copy_(start) if start is not None else part.zero_()
        for tile in strip.tiles:
            _add_product(part, span_of(x, 1, tile.columns), _block(weight, tile, *runs).t(), start)
            start = part
        if strip.masked and overflowed(part, out_runs, start=strip.rows[0]):
            exact = by_level(lambda seen: dense(seen, weight, bias, runs), x, runs, dim=1)
            part.copy_(span_of(exact, 1, strip.rows))
    return y


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Pair) -> Tensor:
    """The product over the whole weight, with its structural zeros written out."""
    keep = keep_mask(*runs, weight.device)
    return F.linear(x, weight.where(keep, zero(weight.dtype, weight.device)), bias)


def _add_product(out: Tensor, a: Tensor, b: Tensor, start: Tensor | None) -> None:
    """out = start + a @ b."""
    if start is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(start, a, b, out=out)


def grad_input(dy: Tensor, weight: Tensor, out_runs: Runs, in_runs: Runs) -> Tensor:
    """dy [N, O], weight [O, I] -> dx [N, I]: summed into prefixes, the widest first."""
    dy, runs = strided(dy), (out_runs, in_runs)
    cut = _plan(dy, *runs)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    dx = dx if cut.covering else dx.zero_()
    for number, tile in enumerate(cut.widest_first):
        part = span_of(dx, 1, tile.columns)
        start = None if cut.covering and number == 0 else part
        _add_product(part, span_of(dy, 1, tile.rows), _block(weight, tile, *runs), start)
    return dx


def grad_weight(dy: Tensor, x: Tensor, weight: Tensor, out_runs: Runs, in_runs: Runs) -> Tensor:
    """dy [N, O], x [N, I] -> dW, laid out as weight [O, I] is, zero at the structural zeros."""
    dy, x, runs = strided(dy), strided(x), (out_runs, in_runs)
    cut, dw = _plan(x, *runs), torch.empty_like(weight)
    for hole in cut.holes:
        hole.of(dw).zero_()
    for tile in cut.widest_first:
        part = tile.of(dw)
        torch.mm(span_of(dy, 1, tile.rows).t(), span_of(x, 1, tile.columns), out=part)
        if tile.masked:
            part.masked_fill_(zeros_of(*runs, tile, dw.device), 0)
    return dw


class Triangle(Context, Protocol):
    """What the product keeps."""

    runs: Pair


class Triangular(torch.autograd.Function):
    """The product with its gradient, for eager mode."""

    @staticmethod
    def forward(
        ctx: Triangle, x: Tensor, weight: Tensor, bias: Tensor | None, runs: Pair
    ) -> Tensor:
        ctx.runs = runs
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return forward(x, weight, bias, *runs)

    @staticmethod
    def backward(ctx: Triangle, *slopes: Tensor) -> Grads:
        if torch.is_grad_enabled():
            raise DoubleBackward("linear")
        (dy,), (x, weight) = slopes, ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = grad_input(dy, weight, *ctx.runs) if needs_x else None
        dw = grad_weight(dy, x, weight, *ctx.runs) if needs_weight else None
        return dx, dw, dy.sum(0) if needs_bias else None, None


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_runs: Runs, in_runs: Runs
) -> Tensor:
    """x [..., I] -> [..., O], differentiable once."""
    flat = as_rows(x)
    if _plan(flat, out_runs, in_runs).dense:
        runs = (out_runs, in_runs)
        y = dense(x, weight, bias, runs)
        if not overflowed(y, out_runs, dim=x.ndim - 1):
            return y
        return by_level(lambda seen: dense(seen, weight, bias, runs), x, runs, dim=x.ndim - 1)
    y = Triangular.apply(flat, weight, bias, (out_runs, in_runs))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])
