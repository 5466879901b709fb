"""LayerNorm, RMSNorm and one-group GroupNorm whose statistics are those of each unit's level.

One form serves all three: x is viewed as [N, C, S] (S = 1 for the last-dim norms) and the level is
along C. With r = rsqrt(var + eps), y_i = (x_i - mean_l) r_l for a unit i of level l. Its backward,
for g = dy * weight and sums over the units i of level l:

    dmean_l = -r_l sum g_i          dvar_l = -1/2 r_l^3 sum g_i (x_i - mean_l)
    dx_j = g_j r_l(j) + sum over levels l that j enters of (dmean_l + 2 dvar_l (x_j - mean_l)) / n_l

where j enters its own level only (block), or its own and all higher ones (prefix).
"""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshkafy.kernels.levels import Bands, Runs, bands_of, index_tensor


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


def sizes_of(bands: Bands, inner: int, like: Tensor) -> Tensor:
    """The number of values in each band, [L]."""
    return like.new_tensor([(hi - lo) * inner for lo, hi in bands.pairs()])


def own_moments(x: Tensor, bands: Bands, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each band of x [N, C, S]: two [N, L]."""
    parts = [x[:, lo:hi] for lo, hi in bands.pairs()]
    if not centred:
        squares = torch.stack([part.square().sum((1, 2)) for part in parts], 1)
        return torch.zeros_like(squares), squares
    means = [part.mean((1, 2)) for part in parts]
    squares = [(p - m[:, None, None]).square().sum((1, 2)) for p, m in zip(parts, means, strict=True)]
    return torch.stack(means, 1), torch.stack(squares, 1)


def merge(mean: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each prefix of bands (Chan's merge: no difference of large squares)."""
    total = n.cumsum(0)
    joint = (mean * n).cumsum(1) / total
    apart = (mean[:, None, :] - joint[:, :, None]).square() * n
    beyond = torch.ones(len(n), len(n), dtype=torch.bool, device=n.device).triu(1)
    return joint, (squares[:, None, :] + apart).masked_fill(beyond, 0).sum(2) / total


def moments(x: Tensor, bands: Bands, *, centred: bool, prefix: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance that each band is normalised with, [N, L] each."""
    mean, squares = own_moments(x, bands, centred=centred)
    n = sizes_of(bands, x.shape[2], mean)
    return merge(mean, squares, n) if prefix else (mean, squares / n)


def scale_bands(x: Tensor, shift: Tensor, scale: Tensor, bands: Bands) -> Tensor:
    """(x - shift) * scale with one shift and scale per band, x [N, C, S]."""
    out = torch.empty_like(x)
    for k, (lo, hi) in enumerate(bands.pairs()):
        part = out[:, lo:hi]
        torch.sub(x[:, lo:hi], shift[:, k, None, None], out=part)
        part.mul_(scale[:, k, None, None])
    return out


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    bands: Bands,
    prefix: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, S] -> y [N, C, S], mean [N, L], rstd [N, L]."""
    values = sort_dim(x.to(accumulation_dtype(x.dtype)), bands, 1)
    mean, var = moments(values, bands, centred=centred, prefix=prefix)
    rstd = torch.rsqrt(var + eps)
    y = unsort_dim(scale_bands(values, mean, rstd, bands), bands, 1)
    y = y if weight is None else y.mul_(weight[:, None])
    y = y if bias is None else y.add_(bias[:, None])
    return y.to(x.dtype), mean, rstd


def band_sums(x: Tensor, bands: Bands) -> Tensor:
    """The sum of each band of x [N, C, S], [N, L]."""
    return torch.stack([x[:, lo:hi].sum((1, 2)) for lo, hi in bands.pairs()], 1)


def input_coefficients(
    g: Tensor, hat: Tensor, mean: Tensor, rstd: Tensor, *, bands: Bands, prefix: bool
) -> tuple[Tensor, Tensor]:
    """dx_j = g_j r + a + b (x_j - mean), with a and b [N, L] of j's band."""
    n = sizes_of(bands, g.shape[2], mean)
    n = n.cumsum(0) if prefix else n
    a = -rstd * band_sums(g, bands) / n
    b = -rstd.square() * band_sums(g * hat, bands) / n
    if not prefix:
        return a, b
    below = torch.ones(len(n), len(n), dtype=torch.bool, device=n.device).tril(-1)
    apart = (mean[:, :, None] - mean[:, None, :]) * b[:, None, :]
    a = (a[:, None, :] + apart).masked_fill(below, 0).sum(2)
    return a, b.flip(1).cumsum(1).flip(1)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    bands: Bands,
    prefix: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [N, C, S], dweight [C], dbias [C]."""
    dtype = accumulation_dtype(x.dtype)
    values, dy = sort_dim(x.to(dtype), bands, 1), sort_dim(dy.to(dtype), bands, 1)
    hat = scale_bands(values, mean, rstd, bands)
    g = dy if weight is None else dy * sort_dim(weight.to(dtype), bands, 0)[:, None]
    a, b = input_coefficients(g, hat, mean, rstd, bands=bands, prefix=prefix)
    a = a if centred else torch.zeros_like(a)
    dx = torch.empty_like(g)
    for k, (lo, hi) in enumerate(bands.pairs()):
        slope = (b[:, k] / rstd[:, k])[:, None, None]
        part = torch.addcmul(a[:, k, None, None], hat[:, lo:hi], slope)
        torch.addcmul(part, g[:, lo:hi], rstd[:, k, None, None], out=dx[:, lo:hi])
    dweight, dbias = (dy * hat).sum((0, 2)), dy.sum((0, 2))
    return (
        unsort_dim(dx, bands, 1).to(x.dtype),
        unsort_dim(dweight, bands, 0),
        unsort_dim(dbias, bands, 0),
    )
