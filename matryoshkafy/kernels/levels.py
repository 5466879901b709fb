"""Levels along a dim as run-length lists: [length0, level0, length1, level1, ...].

Cached tensors are made outside of inference mode, whatever the caller is in: an inference tensor
could not be saved for a later backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError

Runs = tuple[int, ...]


class RunsError(MatryoshkafyError):
    """The runs do not describe the dim that they were given for."""


@dataclass(frozen=True)
class Span:
    """Neighbouring indices lo..hi-1 of one level."""

    lo: int
    hi: int
    level: int


@dataclass(frozen=True)
class Bands:
    """A dim sorted by level: band k is order[bounds[k]:bounds[k + 1]]; order None is the identity.

    Levels that no index has do not appear.
    """

    order: tuple[int, ...] | None
    bounds: tuple[int, ...]

    def pairs(self) -> list[tuple[int, int]]:
        """The (lo, hi) of each band, lowest level first."""
        return list(zip(self.bounds, self.bounds[1:], strict=False))


def check_runs(runs: Sequence[int], length: int, what: str) -> None:
    """Raises RunsError unless `runs` are pairs whose lengths add up to `length`."""
    if len(runs) % 2 or sum(runs[::2]) != length:
        raise RunsError(
            f"the runs {list(runs)} describe {sum(runs[::2])} indices, but {what} has {length}; "
            "give [length, level, length, level, ...] with lengths that add up to it"
        )


@lru_cache(maxsize=4096)
def levels_of(runs: Runs) -> tuple[int, ...]:
    """The level of each index."""
    pairs = zip(runs[::2], runs[1::2], strict=True)
    return tuple(level for length, level in pairs for _ in range(length))


@lru_cache(maxsize=4096)
def spans_of(runs: Runs) -> tuple[Span, ...]:
    """The runs as spans: empty ones dropped, equal neighbours joined."""
    spans: list[Span] = []
    lo = 0
    for length, level in zip(runs[::2], runs[1::2], strict=True):
        if spans and spans[-1].level == level:
            spans[-1] = Span(spans[-1].lo, lo + length, level)
        elif length:
            spans.append(Span(lo, lo + length, level))
        lo += length
    return tuple(spans)


def joined(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """The (lo, hi) of spans, neighbours joined."""
    pieces: list[tuple[int, int]] = []
    for span in spans:
        if pieces and pieces[-1][1] == span.lo:
            pieces[-1] = (pieces[-1][0], span.hi)
        else:
            pieces.append((span.lo, span.hi))
    return pieces


@lru_cache(maxsize=4096)
def bands_of(runs: Runs) -> Bands:
    """The dim sorted by level, stably."""
    levels = levels_of(runs)
    order = tuple(sorted(range(len(levels)), key=levels.__getitem__))
    steps = [k for k in range(1, len(order)) if levels[order[k]] != levels[order[k - 1]]]
    bounds = (0, *steps, len(order)) if order else (0,)
    return Bands(None if order == tuple(range(len(order))) else order, bounds)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def level_tensor(runs: Runs, device: torch.device) -> Tensor:
    """The level of each index as an int64 tensor, cached: never write into it."""
    return torch.tensor(levels_of(runs), device=device, dtype=torch.int64)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def index_tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices as an int64 tensor, cached: never write into it."""
    return torch.tensor(indices, device=device, dtype=torch.int64)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def keep_mask(out_runs: Runs, in_runs: Runs, device: torch.device) -> Tensor:
    """The bool matrix [out, in] of entries that are not structural zeros, cached."""
    return level_tensor(out_runs, device)[:, None] >= level_tensor(in_runs, device)[None, :]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero, cached: never write into it."""
    return torch.zeros((), dtype=dtype, device=device)
