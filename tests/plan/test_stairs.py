"""Widths that are nested already are found, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk

PIECES = (4, 2, 6)


class Row(nn.Module):
    """Layers side by side, each of which reads the pieces before it, and its own or not."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ends = [sum(PIECES[: i + 1]) for i in range(len(PIECES))]
        self.first, self.own = nn.Linear(3, self.ends[-1]), own
        self.layers = nn.ModuleList(nn.ModuleList(self._row()) for _ in range(2))

    def _row(self) -> list[nn.Module]:
        reads = [end if self.own else self.ends[-1] for end in self.ends]
        return [nn.Linear(n, piece) for n, piece in zip(reads, PIECES, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 12]"""
        x = self.first(x)
        for row in self.layers:
            reads = [x[..., :end] if self.own else x for end in self.ends]
            steps = [f(part) for f, part in zip(row, reads, strict=True)]
            x = x + torch.cat(steps, -1).relu()
        return x


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_pieces_go_one_after_another(nesting: str) -> None:
    x = torch.randn(5, 3)
    doll = mk.convert(Row(own=True), (x,), sizes=[4, 5, 6, 12], nesting=nesting)
    plan = doll.plan
    assert [[plan.groups[g].size for g in stair] for stair in plan.stairs] == [list(PIECES)]
    assert [[w[g] for g in plan.stairs[0]] for w in plan.ladder] == [
        [4, 0, 0], [4, 1, 0], [4, 2, 0], [4, 2, 6],
    ]  # fmt: skip
    assert mk.verify(doll, x).passed
    assert type(plan).from_json(plan.to_json()) == plan and "4 + 2 + 6 units" in str(plan)
    # In masked nesting the size 5 comes between the two units of a piece.
    for size in (4, 6) if nesting == "sliced" else (4,):
        torch.testing.assert_close(mk.slice(doll, size)(x), Row(own=True)(x)[:, :size])


def test_layers_that_read_all_of_a_width_are_no_such_row() -> None:
    plan = mk.inspect(Row(own=False), (torch.randn(5, 3),), sizes=[0.5, 1.0], nesting="sliced")
    assert not plan.stairs and all(w >= 1 for widths in plan.ladder for w in widths)


def test_a_dense_net_is_no_such_row() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.layers = nn.ModuleList(nn.Conv2d(4 * (i + 1), 4, 1) for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            """x [N, 3, H, W] -> [N, 16, H, W]"""
            x = self.first(x)
            for layer in self.layers:
                x = torch.cat([x, layer(x).relu()], 1)
            return x

    assert not mk.inspect(Dense(), (torch.randn(2, 3, 4, 4),), nesting="sliced").stairs
