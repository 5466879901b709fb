"""Packed storage: only the blocks of a block-triangular weight, one level after the other.

flat = [W_0 | W_1 | ...], where W_l [units of level l, inner units of levels <= l] is row-major and
units are in the order of their level. A smaller model is exactly a prefix of flat, and for doubling
sizes the weight, its gradient and the optimizer's state take 2/3 of the dense memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from matryoshkafy.kernels.dispatch import DoubleBackward
from matryoshkafy.kernels.levels import (
    Bands,
    Runs,
    bands_of,
    check_runs,
    index_tensor,
    levels_of,
)
from matryoshkafy.kernels.linear import product, rows, strided
from matryoshkafy.kernels.norms import sort_dim, unsort_dim
from matryoshkafy.kernels.tiling import Strip, span_of, tiling


@dataclass(frozen=True)
class Block:
    """Rows lo..hi-1 (sorted by level) read the first `width` inner units; stored at `start`."""

    lo: int
    hi: int
    width: int
    start: int

    @property
    def stop(self) -> int:
        """Where the next block starts."""
        return self.start + (self.hi - self.lo) * self.width

    def of(self, flat: Tensor) -> Tensor:
        """The block [rows, width], a view."""
        return flat[self.start : self.stop].view(self.hi - self.lo, self.width)


@dataclass(frozen=True)
class Layout:
    """The blocks, and the outer and inner units sorted by level."""

    outer: Bands
    inner: Bands
    blocks: tuple[Block, ...]

    @property
    def sorted_runs(self) -> tuple[Runs, Runs]:
        """The runs of outer and inner units after sorting: block k has level k."""
        ends = [block.width for block in self.blocks]
        widths = [hi - lo for lo, hi in zip([0, *ends], ends, strict=False)]
        heights = [block.hi - block.lo for block in self.blocks]
        unread = self.inner.bounds[-1] - (ends[-1] if ends else 0)
        return numbered(heights), numbered([*widths, unread])

    @property
    def total(self) -> int:
        """The length of flat."""
        return self.blocks[-1].stop if self.blocks else 0


def numbered(lengths: Sequence[int]) -> Runs:
    """Runs of these lengths with levels 0, 1, ..."""
    return tuple(part for level, length in enumerate(lengths) for part in (length, level))


@lru_cache(maxsize=1024)
def layout_of(out_runs: Runs, in_runs: Runs) -> Layout:
    """Where everything lies."""
    outer, inner = bands_of(out_runs), bands_of(in_runs)
    levels = sorted(set(levels_of(out_runs)))
    reads = [sum(level <= top for level in levels_of(in_runs)) for top in levels]
    areas = [(hi - lo) * n for (lo, hi), n in zip(outer.pairs(), reads, strict=True)]
    starts = accumulate(areas, initial=0)
    pairs = zip(outer.pairs(), reads, starts, strict=False)
    return Layout(outer, inner, tuple(Block(lo, hi, n, start) for (lo, hi), n, start in pairs))


def pack(weight: Tensor, out_runs: Sequence[int], in_runs: Sequence[int]) -> Tensor:
    """The flat vector of a weight [O, I]; differentiable. Raises RunsError."""
    check_runs(out_runs, weight.shape[0], "the weight's dim 0")
    check_runs(in_runs, weight.shape[1], "the weight's dim 1")
    layout = layout_of(tuple(out_runs), tuple(in_runs))
    ordered = sort_dim(sort_dim(weight, layout.outer, 0), layout.inner, 1)
    parts = [ordered[b.lo : b.hi, : b.width].reshape(-1) for b in layout.blocks]
    return torch.cat(parts) if parts else weight.new_empty(0)


def unpack(flat: Tensor, out_runs: Sequence[int], in_runs: Sequence[int]) -> Tensor:
    """The weight [O, I] with zeros at the structural zeros."""
    layout = layout_of(tuple(out_runs), tuple(in_runs))
    check_runs([len(flat), 0], layout.total, "the packed weight of these runs")
    ordered = flat.new_zeros(sum(out_runs[::2]), sum(in_runs[::2]))
    for block in layout.blocks:
        ordered[block.lo : block.hi, : block.width] = block.of(flat)
    return unsort_dim(unsort_dim(ordered, layout.inner, 1), layout.outer, 0)


@lru_cache(maxsize=256)
def inverse_of(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that undoes an order."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def strips_of(x: Tensor, layout: Layout) -> list[tuple[Strip, list[Block]]]:
    """The products for the rows of x: each strip with the blocks that it joins."""
    bits = x.shape[0].bit_length()
    cut = tiling(*layout.sorted_runs, bits, x.dtype, x.device.type)
    return [(s, [b for b in layout.blocks if s.rows[0] <= b.lo < s.rows[1]]) for s in cut.strips]


def joined(flat: Tensor, strip: Strip, blocks: list[Block]) -> Tensor:
    """The rows of a strip [height, width]: a view of its only block, or all of them with zeros."""
    if len(blocks) == 1:
        return blocks[0].of(flat)
    top = strip.rows[0]
    whole = flat.new_zeros(strip.rows[1] - top, blocks[-1].width)
    for block in blocks:
        whole[block.lo - top : block.hi - top, : block.width] = block.of(flat)
    return whole


def forward(x: Tensor, flat: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x [N, I] sorted -> y [N, O] sorted."""
    y = x.new_empty(x.shape[0], layout.outer.bounds[-1])
    for strip, blocks in strips_of(x, layout):
        start = None if bias is None else span_of(bias, 0, strip.rows)
        weight = joined(flat, strip, blocks)
        product(span_of(y, 1, strip.rows), x[:, : weight.shape[1]], weight.t(), start)
    return y


def grad_input(dy: Tensor, x: Tensor, flat: Tensor, layout: Layout) -> Tensor:
    """dx [N, I] sorted, summed into prefixes, the widest first."""
    dx, known = torch.empty_like(x), 0
    for strip, blocks in reversed(strips_of(x, layout)):
        weight = joined(flat, strip, blocks)
        part = dx[:, : weight.shape[1]]
        product(part, span_of(dy, 1, strip.rows), weight, part if known else None)
        known = known or weight.shape[1]
    dx[:, known:].zero_()
    return dx


def grad_weight(dy: Tensor, x: Tensor, flat: Tensor, layout: Layout) -> Tensor:
    """dflat."""
    dflat = torch.empty_like(flat)
    for strip, blocks in strips_of(x, layout):
        slope, width = span_of(dy, 1, strip.rows).t(), blocks[-1].width
        if len(blocks) == 1:
            torch.mm(slope, x[:, :width], out=blocks[0].of(dflat))
            continue
        whole = slope @ x[:, :width]
        for block in blocks:
            lo, hi = block.lo - strip.rows[0], block.hi - strip.rows[0]
            block.of(dflat).copy_(whole[lo:hi, : block.width])
    return dflat


class PackedProduct(torch.autograd.Function):
    """The product over sorted units."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(x, flat)
        return forward(strided(x), flat, bias, layout)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise DoubleBackward("packed_linear")
        (x, flat), dy = ctx.saved_tensors, strided(dy)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = grad_input(dy, strided(x), flat, ctx.layout) if needs_x else None
        dflat = grad_weight(dy, strided(x), flat, ctx.layout) if needs_weight else None
        return dx, dflat, dy.sum(0) if needs_bias else None, None


def packed_linear(
    x: Tensor,
    flat: Tensor,
    bias: Tensor | None,
    out_runs: Sequence[int],
    in_runs: Sequence[int],
) -> Tensor:
    """x [..., I] times the packed weight, plus bias [O]: [..., O]. Raises RunsError.

    Autocast is followed. Eager only: compile a model with packed layers without fullgraph.
    """
    layout = layout_of(tuple(out_runs), tuple(in_runs))
    check_runs(in_runs, x.shape[-1], "the last dim of x")
    check_runs([len(flat), 0], layout.total, "the packed weight of these runs")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, flat, bias = x.to(dtype), flat.to(dtype), None if bias is None else bias.to(dtype)
    bias = None if bias is None else sort_dim(bias, layout.outer, 0)
    y = PackedProduct.apply(sort_dim(rows(x), layout.inner, 1), flat, bias, layout)
    if layout.outer.order is not None:
        y = y.index_select(1, index_tensor(inverse_of(layout.outer.order), y.device))
    return y.view(*x.shape[:-1], -1) if x.ndim != 2 else y


class PackedLinear(nn.Module):
    """A block-triangular linear whose parameter holds only its blocks.

    Its state_dict shows, and loads, the dense `weight` [O, I] and `bias` [O]; `packed` is the
    parameter that an optimizer sees.
    """

    def __init__(
        self,
        out_runs: Sequence[int],
        in_runs: Sequence[int],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_runs, self.in_runs = tuple(out_runs), tuple(in_runs)
        width, inner = sum(self.out_runs[::2]), sum(self.in_runs[::2])
        dense = nn.Linear(inner, width, bias=bias, device=device, dtype=dtype)
        self.packed = nn.Parameter(pack(dense.weight.detach(), self.out_runs, self.in_runs))
        self.bias = dense.bias
        self.register_state_dict_post_hook(show_dense)
        self.register_load_state_dict_pre_hook(read_dense)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, out_runs: Sequence[int], in_runs: Sequence[int]
    ) -> PackedLinear:
        """The packed form of a linear, whose structural zeros are dropped."""
        kind = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        made = cls(out_runs, in_runs, bias=linear.bias is not None, **kind)
        made.load_state_dict(linear.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return packed_linear(x, self.packed, self.bias, self.out_runs, self.in_runs)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"out_runs={list(self.out_runs)}, in_runs={list(self.in_runs)}"


def show_dense(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Replaces `packed` by the dense `weight` in a state_dict."""
    assert isinstance(module, PackedLinear)
    flat = state.pop(f"{prefix}packed")
    state[f"{prefix}weight"] = unpack(flat, module.out_runs, module.in_runs)


def read_dense(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Replaces the dense `weight` by `packed` in a state_dict that is being loaded."""
    assert isinstance(module, PackedLinear)
    weight = state.pop(f"{prefix}weight", None)
    if weight is not None:
        state[f"{prefix}packed"] = pack(weight, module.out_runs, module.in_runs)
