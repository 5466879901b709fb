"""Convolutions whose weight is block-triangular over its channel dims.

Plain convolutions of one group are cut into tiles like a linear, where that is estimated to pay;
everything else runs dense with the structural zeros written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from matryoshkafy.kernels.levels import Runs, keep_mask, zero
from matryoshkafy.kernels.overflow import by_level, overflowed
from matryoshkafy.kernels.tiling import Tile, Tiling, conv_tiling, span_of, zeros_of

Ints = tuple[int, ...]
Arguments = tuple[Ints, Ints, Ints, bool, Ints, int]


@dataclass(frozen=True)
class Geometry:
    """The arguments of aten.convolution that are not tensors, and the levels of the channels."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    out_runs: Runs
    in_runs: Runs

    @property
    def arguments(self) -> Arguments:
        """In the order of aten.convolution."""
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    @property
    def plain(self) -> bool:
        """Whether it may be cut."""
        return self.groups == 1 and not self.transposed


def _plan(weight: Tensor, positions: int, geometry: Geometry) -> Tiling | None:
    """The cut for so many output positions, or None for one dense convolution."""
    if not geometry.plain:
        return None
    work = (positions * prod(weight.shape[2:])).bit_length()
    runs = (geometry.out_runs, geometry.in_runs)
    cut = conv_tiling(*runs, work, weight.dtype, weight.device.type)
    return None if cut.dense else cut


def places_of(y: Tensor) -> int:
    """The number of output positions of y [N, O, *spatial]."""
    return y.shape[0] * prod(y.shape[2:])


def _masked(weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight with its structural zeros written out."""
    keep = keep_mask(geometry.out_runs, geometry.in_runs, weight.device)
    keep = (keep.t() if geometry.transposed else keep).repeat(geometry.groups, 1)
    keep = keep.view(*keep.shape, *[1] * (weight.ndim - 2))
    return weight.where(keep, zero(weight.dtype, weight.device))


def _block(weight: Tensor, tile: Tile, geometry: Geometry) -> Tensor:
    """A tile of the weight, free of garbage."""
    part = tile.of(weight)
    return part.masked_fill(hidden(part, tile, geometry), 0) if tile.masked else part


def hidden(part: Tensor, tile: Tile, geometry: Geometry) -> Tensor:
    """The structural zeros of a tile, broadcast over the kernel's dims."""
    found = zeros_of(geometry.out_runs, geometry.in_runs, tile, part.device)
    return found.view(*found.shape, *[1] * (part.ndim - 2))


def output_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    """Of a plain convolution."""
    sizes = zip(
        x.shape[2:],
        weight.shape[2:],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        strict=True,
    )
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return [x.shape[0], weight.shape[0], *spatial]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """x [N, C, *spatial] -> [N, O, *spatial]."""
    y = cut_forward(x, weight, bias, geometry)
    runs = (geometry.out_runs, geometry.in_runs)
    if not overflowed(y, runs[0] * geometry.groups):
        return y
    dense = partial(dense_forward, weight=weight, bias=bias, geometry=geometry)
    return by_level(dense, x, runs, dim=1, groups=geometry.groups)


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution over the whole weight, with its structural zeros written out."""
    return torch.convolution(x, _masked(weight, geometry), bias, *geometry.arguments)


def cut_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The same by tiles."""
    shape = output_shape(x, weight, geometry) if geometry.plain else None
    cut = _plan(weight, shape[0] * prod(shape[2:]), geometry) if shape else None
    if cut is None or shape is None:
        return dense_forward(x, weight, bias, geometry)
    y = x.new_empty(shape)
    for strip in cut.strips:
        part = span_of(y, 1, strip.rows)
        start = None if bias is None else span_of(bias, 0, strip.rows)
        if not strip.tiles:
            part.zero_() if start is None else part.copy_(start.view(-1, *[1] * (x.ndim - 2)))
        for number, tile in enumerate(strip.tiles):
            piece, kernel = span_of(x, 1, tile.columns), _block(weight, tile, geometry)
            product = torch.convolution(
                piece, kernel, None if number else start, *geometry.arguments
            )
            part.add_(product) if number else part.copy_(product)
    return y


def derivative(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, wanted: int) -> Tensor:
    """dx (wanted 0) or dW (wanted 1) of a dense convolution."""
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry.arguments, mask)[
        wanted
    ]


def grad_input(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dx, of the shape of x (whose values are not read)."""
    cut = _plan(weight, places_of(dy), geometry)
    if cut is None:
        return derivative(dy, x, _masked(weight, geometry), geometry, wanted=0)
    dx = x.new_zeros(x.shape)
    for number, tile in enumerate(cut.widest_first):
        piece, kernel = span_of(x, 1, tile.columns), _block(weight, tile, geometry)
        product = derivative(span_of(dy, 1, tile.rows), piece, kernel, geometry, wanted=0)
        if number == 0 and cut.covering:
            dx = product
        else:
            span_of(dx, 1, tile.columns).add_(product)
    return dx


def grad_weight(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dW, zero at the structural zeros; weight gives the shape (its values are not read)."""
    cut = _plan(weight, places_of(dy), geometry)
    if cut is None:
        return _masked(derivative(dy, x, weight, geometry, wanted=1), geometry)
    dw = weight.new_zeros(weight.shape)
    for tile in cut.widest_first:
        part, piece = tile.of(dw), span_of(x, 1, tile.columns)
        product = derivative(span_of(dy, 1, tile.rows), piece, part, geometry, wanted=1)
        part.copy_(product)
        if tile.masked:
            part.masked_fill_(hidden(part, tile, geometry), 0)
    return dw
