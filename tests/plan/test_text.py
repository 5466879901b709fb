"""A plan fits 80 columns, and layers that repeat are one row."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.plan.text import columns, folded


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_name_that_is_rather_long_for_a_table, self.down = (
            nn.Linear(16, 24),
            nn.Linear(24, 16),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.a_name_that_is_rather_long_for_a_table(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 5)
        self.layers = nn.ModuleList(Block() for _ in range(12))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def test_a_deep_model_fits_the_screen() -> None:
    plan = mk.inspect(Deep(), torch.randint(30, (2, 3)), sizes="1..16:1")
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    folded_rows = [line for line in lines if "layers.0-11" in line]
    assert len(folded_rows) == 1 and not any("layers.3" in line for line in lines)
    here = Path(__file__).name
    assert any("vocabulary" in line and here in line for line in lines)


def test_rows_fold_where_they_differ_in_one_number() -> None:
    rows = [(f"h.{i}.{part}", "1") for i in (0, 1, 2, 5) for part in ("q", "k")]
    assert folded(rows) == [("h.0-2,5.q", "1"), ("h.0-2,5.k", "1")]
    grid = [(f"s.{i}.b.{j}.w", "1") for i in range(2) for j in range(3)]
    assert folded(grid) == [("s.0-1.b.0-2.w", "1")]
    uneven = [("s.0.b.0.w", "1"), ("s.0.b.1.w", "1"), ("s.1.b.0.w", "1")]
    assert folded(uneven) == [("s.0.b.0-1.w", "1"), ("s.1.b.0.w", "1")]
    assert folded([("h.0", "1"), ("h.1", "2"), ("h.2", "1")]) == [("h.0,2", "1"), ("h.1", "2")]
    assert folded([("a", "1"), ("a", "1")]) == [("a", "1"), ("a", "1")]


def test_columns_are_cut_in_the_middle() -> None:
    (line,) = columns([("first." * 20 + "end", "7", "x" * 50)], 60)
    assert len(line) <= 60 and line.startswith("first.") and ".." in line
