"""How a block-triangular product is cut into dense products.

Rows of the weight are the outer units, columns the inner ones. A strip is a range of rows with the
column ranges that its highest level reads. Strips follow the levels where the blocks are large;
neighbouring small levels share a masked strip, because a product has a fixed cost. The cut of
least estimated time is found by dynamic programming over the row spans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from matryoshkafy.kernels.levels import Runs, Span, joined, levels_of, spans_of

Range = tuple[int, int]


@dataclass(frozen=True)
class Estimate:
    """Seconds of a product [N, k] x [k, n]: call + 2 N n k / flops, + n k / masked if masked."""

    call: float
    flops: float
    masked: float


# Measured on one core of an EPYC (Zen 4), torch 2.15, for cpu; from data sheets for cuda.
COSTS: dict[tuple[str, torch.dtype], Estimate] = {
    ("cpu", torch.float32): Estimate(40e-6, 1.0e11, 1e9),
    ("cpu", torch.float64): Estimate(40e-6, 0.5e11, 1e9),
    ("cpu", torch.bfloat16): Estimate(100e-6, 2.2e11, 1e9),
    ("cpu", torch.float16): Estimate(100e-6, 2.2e11, 1e9),
    ("cuda", torch.float32): Estimate(8e-6, 2e13, 2e11),
    ("cuda", torch.float64): Estimate(8e-6, 1e13, 2e11),
    ("cuda", torch.bfloat16): Estimate(8e-6, 3e14, 4e11),
    ("cuda", torch.float16): Estimate(8e-6, 3e14, 4e11),
}
# A convolution call costs so many product calls: it reorders its inputs and copies its output.
CONV_CALL = 3
DEFAULT = Estimate(10e-6, 1e13, 1e11)


@dataclass(frozen=True)
class Tile:
    """One dense product: the rows and columns of the weight that it uses; masked: zeros inside."""

    rows: Range
    columns: Range
    masked: bool

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.columns[1] - self.columns[0]

    def of(self, weight: Tensor) -> Tensor:
        """The tile of a weight [O, I], a view."""
        return span_of(span_of(weight, 0, self.rows), 1, self.columns)


@dataclass(frozen=True)
class Strip:
    """Neighbouring rows of the weight, and the columns that they read."""

    rows: Range
    columns: tuple[Range, ...]
    masked: bool

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """One tile per column range."""
        return tuple(Tile(self.rows, part, self.masked) for part in self.columns)


@dataclass(frozen=True)
class Tiling:
    """The strips of a weight [O, I], its tiles from the widest on, and the rectangles left out."""

    strips: tuple[Strip, ...]
    widest_first: tuple[Tile, ...]
    holes: tuple[Tile, ...]
    covering: bool

    @property
    def dense(self) -> bool:
        """Whether one product does it all."""
        return len(self.widest_first) == 1 and not self.holes


def span_of(x: Tensor, dim: int, bounds: Range) -> Tensor:
    """x[lo:hi] along a dim, a view."""
    return x.narrow(dim, bounds[0], bounds[1] - bounds[0])


def estimate(strip: Strip, rows: int, cost: Estimate) -> float:
    """The seconds of a strip for `rows` rows of x."""
    height = strip.rows[1] - strip.rows[0]
    area = height * sum(hi - lo for lo, hi in strip.columns)
    fill = area / cost.masked + cost.call / 2 if strip.masked else 0.0
    return max(len(strip.columns), 1) * cost.call + 2 * rows * area / cost.flops + fill


def _candidates(spans: tuple[Span, ...], inner: tuple[Span, ...]) -> list[Strip]:
    """The ways to do neighbouring row spans in one strip: exact column ranges, or their hull."""
    top, low = max(s.level for s in spans), min(s.level for s in spans)
    pieces = tuple(joined([s for s in inner if s.level <= top]))
    steps = any(low < s.level <= top for s in inner)
    rows = (spans[0].lo, spans[-1].hi)
    exact = Strip(rows, pieces, steps)
    if len(pieces) < 2:
        return [exact]
    return [exact, Strip(rows, ((pieces[0][0], pieces[-1][1]),), True)]


def _cut(
    outer: tuple[Span, ...], inner: tuple[Span, ...], rows: int, cost: Estimate
) -> list[Strip]:
    """The strips of least estimated time."""
    best: list[tuple[float, list[Strip]]] = [(0.0, [])]
    for end in range(1, len(outer) + 1):
        options = [
            (best[start][0] + estimate(strip, rows, cost), [*best[start][1], strip])
            for start in range(end)
            for strip in _candidates(outer[start:end], inner)
        ]
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def complement(columns: tuple[Range, ...], total: int) -> list[Range]:
    """The ranges of 0..total-1 that the columns leave out."""
    edges = [0, *[edge for pair in columns for edge in pair], total]
    return [(lo, hi) for lo, hi in zip(edges[::2], edges[1::2], strict=True) if lo < hi]


@lru_cache(maxsize=4096)
def tiling(out_runs: Runs, in_runs: Runs, bits: int, dtype: torch.dtype, device: str) -> Tiling:
    """The cut for about 2**bits rows of x on a kind of device."""
    return cut_all(out_runs, in_runs, bits, COSTS.get((device, dtype), DEFAULT))


@lru_cache(maxsize=4096)
def conv_tiling(
    out_runs: Runs, in_runs: Runs, bits: int, dtype: torch.dtype, device: str
) -> Tiling:
    """The same for a convolution, with 2**bits = output positions times the kernel's volume."""
    cost = COSTS.get((device, dtype), DEFAULT)
    return cut_all(out_runs, in_runs, bits, replace(cost, call=cost.call * CONV_CALL))


def cut_all(out_runs: Runs, in_runs: Runs, bits: int, cost: Estimate) -> Tiling:
    """The cut of least estimated time, and what follows from it."""
    strips = tuple(_cut(spans_of(out_runs), spans_of(in_runs), 1 << bits, cost))
    total = sum(in_runs[::2])
    tiles = sorted((tile for s in strips for tile in s.tiles), key=lambda tile: -tile.width)
    holes = [Tile(s.rows, part, True) for s in strips for part in complement(s.columns, total)]
    covering = bool(tiles) and tiles[0].width == total
    return Tiling(strips, tuple(tiles), tuple(holes), covering)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def zeros_of(out_runs: Runs, in_runs: Runs, tile: Tile, device: torch.device) -> Tensor:
    """The bool matrix of a tile's structural zeros, cached: never write into it."""
    outer = torch.tensor(levels_of(out_runs)[slice(*tile.rows)], device=device)
    inner = torch.tensor(levels_of(in_runs)[slice(*tile.columns)], device=device)
    return outer[:, None] < inner[None, :]
