"""Reductions that keep the nested dim: every index gets the statistic of its own level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels.levels import Runs, check_runs, joined, spans_of
from matryoshkafy.kernels.untyped import vector_norm

Reduce = Callable[[Tensor, list[int]], Tensor]

KINDS: dict[str, Reduce] = {
    "mean": lambda x, dims: x.mean(dims, keepdim=True),
    "sum": lambda x, dims: x.sum(dims, keepdim=True),
    "amax": lambda x, dims: x.amax(dims, keepdim=True),
    "amin": lambda x, dims: x.amin(dims, keepdim=True),
    "var": lambda x, dims: x.var(dims, correction=1, keepdim=True),
    "std": lambda x, dims: x.std(dims, correction=1, keepdim=True),
    "var0": lambda x, dims: x.var(dims, correction=0, keepdim=True),
    "std0": lambda x, dims: x.std(dims, correction=0, keepdim=True),
    "norm": lambda x, dims: vector_norm(x, dims, keepdim=True),
}


class UnknownReduction(MatryoshkafyError):
    """The kind of a level_reduce is not in the table."""


def reduction(kind: str) -> Reduce:
    """The function of a kind; raises UnknownReduction."""
    if kind not in KINDS:
        raise UnknownReduction(f"no level reduction {kind!r}; the kinds are {', '.join(KINDS)}")
    return KINDS[kind]


def _reached(x: Tensor, dim: int, runs: Runs, level: int, *, prefix: bool) -> Tensor:
    """The units of x whose values enter the statistic of a level."""
    spans = spans_of(runs)
    pieces = joined([s for s in spans if s.level == level or (prefix and s.level < level)])
    parts = [x.narrow(dim, lo, hi - lo) for lo, hi in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def spread(statistics: dict[int, Tensor], dim: int, runs: Runs) -> Tensor:
    """Each level's statistic at each index of that level."""
    spans = spans_of(runs)
    parts = [
        statistics[s.level].expand(
            [s.hi - s.lo if d == dim else n for d, n in enumerate(statistics[s.level].shape)]
        )
        for s in spans
    ]
    return torch.cat(parts, dim)


def level_reduce(  # noqa: PLR0913 - the operator's schema
    x: Tensor, dims: list[int], dim: int, runs: list[int], kind: str, prefix: bool
) -> Tensor:
    """The statistic over dims of the units that a level reaches, at each index of that level."""
    check_runs(runs, x.shape[dim], f"dim {dim}")
    reduce, pairs = reduction(kind), tuple(runs)
    over, dim = [d % x.ndim for d in dims], dim % x.ndim
    levels = sorted({span.level for span in spans_of(pairs)})
    parts = {level: reduce(_reached(x, dim, pairs, level, prefix=prefix), over) for level in levels}
    return spread(parts, dim, pairs)
