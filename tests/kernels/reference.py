"""Every operator of `matryoshkafy.kernels.ops` in its plainest form: the oracle of the tests.

Nothing here is fast. `runs` are [length, level, length, level, ...] along the nested dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshkafy.kernels.untyped import vector_norm

Reduce = Callable[[Tensor], Tensor]
ReduceDims = Callable[[Tensor, list[int]], Tensor]


def levels(runs: Sequence[int]) -> Tensor:
    """The level of each index."""
    return torch.repeat_interleave(torch.tensor(runs[1::2]), torch.tensor(runs[::2]))


def mask(
    weight: Tensor, dim_out: int, dim_in: int, out_runs: Sequence[int], in_runs: Sequence[int]
) -> Tensor:
    """The weight with zeros where level(out) < level(in)."""
    moved = weight.movedim((dim_out, dim_in), (-2, -1))
    keep = levels(out_runs)[:, None] >= levels(in_runs)[None, :]
    return torch.where(keep, moved, 0).movedim((-2, -1), (dim_out, dim_in))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_runs: Sequence[int],
    in_runs: Sequence[int],
) -> Tensor:
    """A dense linear with a masked weight."""
    return F.linear(x, mask(weight, 0, 1, out_runs, in_runs), bias)


def _reached(runs: Sequence[int], level: int, *, prefix: bool) -> Tensor:
    """The indices whose values enter the statistics of a level."""
    found = levels(runs)
    return torch.nonzero(found <= level if prefix else found == level).flatten()


def per_level(x: Tensor, dim: int, runs: Sequence[int], *, prefix: bool, f: Reduce) -> Tensor:
    """f of the units that each index's level reaches, at that index."""
    columns = [
        f(x.index_select(dim, _reached(runs, int(level), prefix=prefix))) for level in levels(runs)
    ]
    return torch.cat(columns, dim) if columns else x.sum(dim, keepdim=True)[:0]


def normalise(
    x: Tensor, dims: Sequence[int], eps: float, runs: Sequence[int], *, prefix: bool
) -> Tensor:
    """(x - mean) / sqrt(var + eps), with the statistics of each level along dims[0]."""

    def statistic(f: Reduce) -> Tensor:
        return per_level(x, dims[0], runs, prefix=prefix, f=f)

    mean = statistic(lambda part: part.mean(list(dims), keepdim=True))
    var = statistic(lambda part: part.var(list(dims), correction=0, keepdim=True))
    return (x - mean) * torch.rsqrt(var + eps)


def affine(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: Sequence[int]
) -> Tensor:
    """y * weight + bias, where they are given."""
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def layer_norm(  # noqa: PLR0913 - the operator's signature
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    runs: Sequence[int],
    prefix: bool,
) -> Tensor:
    """LayerNorm over the last dim, level by level."""
    y = normalise(x, [-1], eps, runs, prefix=prefix)
    return affine(y, weight, bias, shape=[-1])


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, runs: Sequence[int], prefix: bool
) -> Tensor:
    """RMSNorm over the last dim, level by level."""
    square = per_level(
        x.square(), -1, runs, prefix=prefix, f=lambda part: part.mean(-1, keepdim=True)
    )
    return affine(x * torch.rsqrt(square + eps), weight, None, shape=[-1])


def group_norm(  # noqa: PLR0913 - the operator's signature
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    runs: Sequence[int],
    prefix: bool,
) -> Tensor:
    """GroupNorm with one group over [N, C, *spatial], level by level."""
    y = normalise(x, range(1, x.ndim), eps, runs, prefix=prefix)
    return affine(y, weight, bias, shape=[-1] + [1] * (x.ndim - 2))


REDUCTIONS: dict[str, ReduceDims] = {
    "mean": lambda x, dims: x.mean(dims, keepdim=True),
    "sum": lambda x, dims: x.sum(dims, keepdim=True),
    "amax": lambda x, dims: x.amax(dims, keepdim=True),
    "amin": lambda x, dims: x.amin(dims, keepdim=True),
    "var": lambda x, dims: x.var(dims, keepdim=True),
    "std": lambda x, dims: x.std(dims, keepdim=True),
    "var0": lambda x, dims: x.var(dims, correction=0, keepdim=True),
    "std0": lambda x, dims: x.std(dims, correction=0, keepdim=True),
    "norm": lambda x, dims: vector_norm(x, dims, keepdim=True),
}


def level_reduce(  # noqa: PLR0913 - the operator's signature
    x: Tensor, dims: Sequence[int], dim: int, runs: Sequence[int], kind: str, prefix: bool
) -> Tensor:
    """The reduction over dims, level by level along dim, which keeps its length."""
    reduce = REDUCTIONS[kind]
    return per_level(x, dim, runs, prefix=prefix, f=lambda part: reduce(part, list(dims)))


def nested_cross_entropy(
    hidden: Tensor, table: Tensor, target: Tensor, sizes: Sequence[int], **options: Any
) -> Tensor:
    """The cross entropies of all sizes, [len(sizes)], as people write it: matmul per size, stack.

    hidden [N, D], table [V, D], target [N]; options are those of F.cross_entropy, and bias [V].
    """
    bias = options.pop("bias", None)
    logits = torch.stack([F.linear(hidden[:, :m], table[:, :m], bias) for m in sizes])
    return torch.stack([F.cross_entropy(part, target, **options) for part in logits])
