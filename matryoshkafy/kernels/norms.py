"""LayerNorm, RMSNorm and one-group GroupNorm whose statistics are those of each unit's level.

One form serves all three: x is viewed as [N, C, S] (S = 1 for the last-dim norms), the levels lie
along C, sorted into bands. With r = rsqrt(var + eps), y_i = (x_i - mean_l) r_l for a unit i of
level l. The backward, for g = dy * weight and sums over the units i of level l:

    dmean_l = -r_l sum g_i          dvar_l = -1/2 r_l^3 sum g_i (x_i - mean_l)
    dx_j = g_j r_l(j) + sum over levels l that j enters of (dmean_l + 2 dvar_l (x_j - mean_l)) / n_l

where j enters its own level only (block), or its own and all higher ones (prefix). Centred block
norms take torch's own kernel band by band instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshkafy.kernels.levels import Bands, index_tensor
from matryoshkafy.kernels.untyped import vector_norm

# Values in a chunk of rows on a CPU: what stays in cache between the passes over it.
CACHED = 1 << 20


@dataclass(frozen=True)
class Norm:
    """How to normalise: prefix statistics or those of the own band, less the mean or not."""

    bands: Bands
    eps: float
    prefix: bool
    centred: bool


@dataclass(frozen=True)
class Saved:
    """What the backward reads: x [N, C, S], weight [C] or None, mean and rstd [N, bands]."""

    x: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor


Triple = tuple[Tensor, Tensor, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything smaller is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sort_dim(x: Tensor, bands: Bands, dim: int) -> Tensor:
    """x with the dim in the order of the bands."""
    if bands.order is None:
        return x
    return x.index_select(dim, index_tensor(bands.order, x.device))


def unsort_dim(x: Tensor, bands: Bands, dim: int) -> Tensor:
    """The inverse of sort_dim."""
    if bands.order is None:
        return x
    return torch.empty_like(x).index_copy_(dim, index_tensor(bands.order, x.device), x)


def _optional(x: Tensor | None, bands: Bands, dtype: torch.dtype) -> Tensor | None:
    """A weight or bias in the order of the bands and the dtype of the sums."""
    return None if x is None else sort_dim(x.to(dtype), bands, 0)


def row_chunks(x: Tensor) -> list[slice]:
    """Slices over the rows of x [N, C, S] that keep a chunk in cache; all rows on a GPU."""
    rows, inner = len(x), max(x[:1].numel(), 1)
    step = max(CACHED // inner, 1) if x.device.type == "cpu" else max(rows, 1)
    return [slice(lo, lo + step) for lo in range(0, rows, step)]


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Triple:
    """x [N, C, S] -> y [N, C, S], mean [N, L], rstd [N, L]."""
    dtype, bands = accumulation_dtype(x.dtype), norm.bands
    weight, bias = _optional(weight, bands, dtype), _optional(bias, bands, dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(len(x), len(bands.pairs()), dtype=dtype)
    rstd = torch.empty_like(mean)
    kernel = forward_native if norm.centred and not norm.prefix else forward_general
    for part in row_chunks(x):
        values = sort_dim(x[part], bands, 1).to(dtype)
        final = y[part]
        out = target(final, values, bands)
        mean[part], rstd[part] = kernel(values, weight, bias, norm, out)
        deliver(out, final, bands)
    return y, mean, rstd


def target(final: Tensor, values: Tensor, bands: Bands) -> Tensor:
    """Where a kernel writes: the final place, unless it still has to be reordered or cast."""
    direct = bands.order is None and final.dtype == values.dtype
    return final if direct else torch.empty_like(values)


def deliver(out: Tensor, final: Tensor, bands: Bands) -> None:
    """Moves what a kernel wrote to its final place."""
    if out is not final:
        final.copy_(unsort_dim(out, bands, 1))


def forward_native(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, out: Tensor
) -> tuple[Tensor, Tensor]:
    """torch's own kernel on each band: mean and rstd [N, L]."""
    means: list[Tensor] = []
    rstds: list[Tensor] = []
    for lo, hi in norm.bands.pairs():
        w = None if weight is None else weight[lo:hi]
        b = None if bias is None else bias[lo:hi]
        out[:, lo:hi], mean, rstd = _native(x[:, lo:hi].contiguous(), w, b, norm.eps)
        means.append(mean)
        rstds.append(rstd)
    return torch.cat(means, 1), torch.cat(rstds, 1)


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Triple:
    """The norm of x [N, c, S] over c and S, mean and rstd [N, 1]: the faster of two kernels."""
    rows, width, inner = x.shape
    if inner > 1:
        return torch.native_group_norm(x, weight, bias, rows, width, inner, 1, eps)
    y, mean, rstd = torch.native_layer_norm(x.view(rows, width), (width,), weight, bias, eps)
    return y.view(x.shape), mean, rstd


def native_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Triple:
    """dx [N, c, S], dweight [c], dbias [c] of `native`."""
    (rows, width, inner), every = x.shape, [True, True, True]
    if inner > 1:
        return torch.ops.aten.native_group_norm_backward(
            dy, x, mean, rstd, weight, rows, width, inner, 1, every
        )
    flat = (dy.view(rows, width), x.view(rows, width))
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        *flat, (width,), mean, rstd, weight, weight, every
    )
    return dx.view(x.shape), dw, db


def forward_general(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The general form: mean and rstd [N, L]."""
    mean, var = moments(x, norm)
    rstd = torch.rsqrt(var + norm.eps)
    scale_bands(x, mean, rstd, norm, out)
    if weight is not None:
        out.mul_(weight[:, None])
    if bias is not None:
        out.add_(bias[:, None])
    return mean, rstd


def counts(norm: Norm, inner: int, like: Tensor) -> Tensor:
    """The number of values whose statistics each band uses, [L]."""
    # Cached on the device: a copy from the host cannot be a part of a recorded CUDA graph.
    units = index_tensor(tuple(hi - lo for lo, hi in norm.bands.pairs()), like.device)
    own = units.to(like.dtype) * inner
    return own.cumsum(0) if norm.prefix else own


def own_moments(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean (or 0) and sum of squared deviations from it of each band: two [N, L]."""
    means: list[Tensor] = []
    squares: list[Tensor] = []
    for lo, hi in norm.bands.pairs():
        part = x[:, lo:hi]
        if norm.centred:
            means.append(part.mean((1, 2)))
            part = part - means[-1][:, None, None]
        squares.append(vector_norm(part, (1, 2)).square())
    joint = torch.stack(squares, 1)
    return (torch.stack(means, 1) if norm.centred else torch.zeros_like(joint)), joint


def moments(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and variance that each band is normalised with, [N, L] each."""
    mean, squares = own_moments(x, norm)
    n = counts(norm, x.shape[2], mean)
    if not norm.prefix:
        return mean, squares / n
    if not norm.centred:
        return mean, squares.cumsum(1) / n
    return merge(mean, squares, n)


def merge(mean: Tensor, squares: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each prefix of bands (Chan's merge: no difference of large squares)."""
    n = total.diff(prepend=total.new_zeros(1))
    joint = (mean * n).cumsum(1) / total
    apart = (mean[:, None, :] - joint[:, :, None]).square() * n
    beyond = torch.ones(len(n), len(n), dtype=torch.bool, device=n.device).triu(1)
    return joint, (squares[:, None, :] + apart).masked_fill(beyond, 0).sum(2) / total


def scale_bands(x: Tensor, shift: Tensor, scale: Tensor, norm: Norm, out: Tensor) -> None:
    """out = (x - shift) * scale with one shift and scale per band."""
    for k, (lo, hi) in enumerate(norm.bands.pairs()):
        part, factor = out[:, lo:hi], scale[:, k, None, None]
        if norm.centred:
            torch.sub(x[:, lo:hi], shift[:, k, None, None], out=part)
            part.mul_(factor)
        else:
            torch.mul(x[:, lo:hi], factor, out=part)


def backward(dy: Tensor, saved: Saved, norm: Norm) -> Triple:
    """dx [N, C, S], dweight [C], dbias [C]."""
    dtype, bands = saved.mean.dtype, norm.bands
    dx = torch.empty_like(saved.x, memory_format=torch.contiguous_format)
    dweight, dbias = saved.mean.new_zeros(2, saved.x.shape[1])
    weight = _optional(saved.weight, bands, dtype)
    kernel = backward_native if norm.centred and not norm.prefix else backward_general
    for part in row_chunks(saved.x):
        slope = sort_dim(dy[part], bands, 1).to(dtype)
        x = sort_dim(saved.x[part], bands, 1).to(dtype)
        here = Saved(x, weight, saved.mean[part], saved.rstd[part])
        final = dx[part]
        out = target(final, x, bands)
        dw, db = kernel(slope, here, norm, out)
        deliver(out, final, bands)
        dweight += dw
        dbias += db
    return dx, unsort_dim(dweight, bands, 0), unsort_dim(dbias, bands, 0)


def backward_native(dy: Tensor, saved: Saved, norm: Norm, dx: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own kernel on each band: dweight and dbias [C]."""
    dws: list[Tensor] = []
    dbs: list[Tensor] = []
    ones = dy.new_ones(dy.shape[1]) if saved.weight is None else saved.weight
    for k, (lo, hi) in enumerate(norm.bands.pairs()):
        stats = (saved.mean[:, k : k + 1].contiguous(), saved.rstd[:, k : k + 1].contiguous())
        parts = (dy[:, lo:hi].contiguous(), saved.x[:, lo:hi].contiguous())
        dx[:, lo:hi], dw, db = native_backward(*parts, ones[lo:hi], *stats)
        dws.append(dw)
        dbs.append(db)
    return torch.cat(dws), torch.cat(dbs)


def backward_general(dy: Tensor, saved: Saved, norm: Norm, dx: Tensor) -> tuple[Tensor, Tensor]:
    """The general form: dweight and dbias [C]."""
    scale_bands(saved.x, saved.mean, saved.rstd, norm, dx)
    along = dy * dx
    dweight, dbias = along.sum((0, 2)), dy.sum((0, 2))
    if saved.weight is not None:
        dy, along = dy * saved.weight[:, None], along.mul_(saved.weight[:, None])
    a, b = coefficients(band_sums(dy, norm), band_sums(along, norm), saved, norm)
    for k, (lo, hi) in enumerate(norm.bands.pairs()):
        part = dx[:, lo:hi].mul_((b[:, k] / saved.rstd[:, k])[:, None, None])
        part.addcmul_(dy[:, lo:hi], saved.rstd[:, k, None, None])
        if norm.centred:
            part.add_(a[:, k, None, None])
    return dweight, dbias


def band_sums(x: Tensor, norm: Norm) -> Tensor:
    """The sum of each band of x [N, C, S], [N, L]."""
    return torch.stack([x[:, lo:hi].sum((1, 2)) for lo, hi in norm.bands.pairs()], 1)


def coefficients(plain: Tensor, along: Tensor, saved: Saved, norm: Norm) -> tuple[Tensor, Tensor]:
    """dx_j = g_j r + a + b (x_j - mean), from sums of g and of g times the normalised x."""
    n = counts(norm, saved.x.shape[2], saved.mean)
    a, b = -saved.rstd * plain / n, -saved.rstd.square() * along / n
    if not norm.prefix:
        return a, b
    below = torch.ones(len(n), len(n), dtype=torch.bool, device=n.device).tril(-1)
    apart = (saved.mean[:, :, None] - saved.mean[:, None, :]) * b[:, None, :]
    a = (a[:, None, :] + apart).masked_fill(below, 0).sum(2)
    return a, b.flip(1).cumsum(1).flip(1)
