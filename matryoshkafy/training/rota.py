"""Which sizes learn from which rows at a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """One size's part of a step: its rows (indices into the data), and the weight of its loss."""

    size: int
    rows: Tensor
    weight: float


@dataclass(frozen=True)
class Rota:
    """The sizes of a doll in turn.

    Attributes:
        sizes: ascending.
        mode: a key of `ROTAS`.
        weights: {size: weight}, 1 where none is given.
        widen: the part of the run over which the smaller sizes join, one after the other.
        last: the part at the end in which the largest size alone learns.
    """

    sizes: tuple[int, ...]
    mode: str
    weights: Mapping[int, float]
    widen: float = 0.0
    last: float = 0.0

    def open(self, progress: float) -> list[int]:
        """Return the sizes that learn at this part (0 to 1) of the run."""
        if progress >= 1 - self.last:
            return [self.sizes[-1]]
        count = len(self.sizes)
        joined = count if self.widen <= 0 else 1 + int((count - 1) * progress / self.widen)
        return list(self.sizes[max(0, count - joined) :])

    def passes(
        self, rows: Tensor, progress: float, generator: torch.Generator
    ) -> list[list[Share]]:
        """Return the shares of a step, those over the same rows together."""
        sizes = self.open(progress)
        weights = torch.tensor([self.weights.get(m, 1.0) for m in sizes])
        return ROTAS[self.mode](sizes, weights, rows, generator)


def every(sizes: list[int], weights: Tensor, rows: Tensor, _: torch.Generator) -> list[list[Share]]:
    """All sizes over all rows; the weights sum to 1."""
    parts = [float(w) for w in weights / weights.sum()]
    return [[Share(m, rows, w) for m, w in zip(sizes, parts, strict=True)]]


def sandwich(
    sizes: list[int], weights: Tensor, rows: Tensor, generator: torch.Generator
) -> list[list[Share]]:
    """The largest, the smallest and one between (Yu & Huang 2019), over all rows."""
    picked = {0, len(sizes) - 1}
    if len(sizes) > 2:
        between = torch.randint(1, len(sizes) - 1, (1,), generator=generator)
        picked.add(int(between))
    chosen = sorted(picked)
    return every([sizes[i] for i in chosen], weights[chosen], rows, generator)


def one(
    sizes: list[int], weights: Tensor, rows: Tensor, generator: torch.Generator
) -> list[list[Share]]:
    """One size over all rows, drawn by the weights."""
    at = int(torch.multinomial(weights, 1, generator=generator))
    return [[Share(sizes[at], rows, 1.0)]]


def by_rows(
    sizes: list[int], weights: Tensor, rows: Tensor, generator: torch.Generator
) -> list[list[Share]]:
    """Each row for one size: shares by the weights, what is left over goes by chance.

    A size of fewer than two rows is left out (a similarity needs two), its rows go to the largest.
    The loss of a size counts by its rows, so that the sum is the mean over the rows.
    """
    exact = weights / weights.sum() * len(rows)
    counts = exact.floor().long()
    rest = len(rows) - int(counts.sum())
    if rest:
        chances = (exact - counts).clamp_min(1e-6)
        counts[torch.multinomial(chances, rest, generator=generator)] += 1
    counts[:-1][counts[:-1] < 2] = 0
    counts[-1] = len(rows) - counts[:-1].sum()
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    parts = torch.split(shuffled, [int(n) for n in counts])
    return [
        [Share(m, part, len(part) / len(rows))]
        for m, part in zip(sizes, parts, strict=True)
        if len(part) >= min(2, len(rows))
    ]


Rotation = Callable[[list[int], Tensor, Tensor, torch.Generator], list[list[Share]]]
ROTAS: dict[str, Rotation] = {"rows": by_rows, "one": one, "sandwich": sandwich, "all": every}
