"""A plan fits 80 columns, and layers that repeat are one row."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.plan.folding import folded
from matryoshkafy.plan.text import columns, told


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
    at = next(i for i, line in enumerate(lines) if line.startswith("  vocabulary: "))
    assert lines[at + 1].split() == ["30", "table.weight:0", lines[at + 1].split()[-1]]
    assert here in lines[at + 1]


def test_rows_fold_where_they_differ_in_one_number() -> None:
    rows = [(f"h.{i}.{part}", "1") for i in (0, 1, 2, 5) for part in ("q", "k")]
    assert folded(rows) == [("h.0-2,5.q", "1"), ("h.0-2,5.k", "1")]
    grid = [(f"s.{i}.b.{j}.w", "1") for i in range(2) for j in range(3)]
    assert folded(grid) == [("s.0-1.b.0-2.w", "1")]
    uneven = [("s.0.b.0.w", "1"), ("s.0.b.1.w", "1"), ("s.1.b.0.w", "1")]
    assert folded(uneven) == [("s.0.b.0-1.w", "1"), ("s.1.b.0.w", "1")]
    assert folded([("h.0", "1"), ("h.1", "2"), ("h.2", "1")]) == [("h.0,2", "1"), ("h.1", "2")]
    assert folded([("a", "1"), ("a", "1")]) == [("a", "1"), ("a", "1")]


def test_numbers_inside_words_fold() -> None:
    rows = [(f"layer{i}.conv{j}.weight:{d}", "3") for i in (1, 2) for j in (1, 2) for d in (2, 3)]
    assert folded(rows) == [("layer1-2.conv1-2.weight:2-3", "3")]
    assert folded([("b01.w", "1"), ("b02.w", "1")]) == [("b01.w", "1"), ("b02.w", "1")]


def test_stages_of_unequal_depth_fold_where_all_their_blocks_are_meant() -> None:
    depths = {1: 3, 2: 4, 3: 6}
    names = [f"layer{i}.{j}.conv.weight" for i, n in depths.items() for j in range(n)]
    rows = [(name, "3") for name in names]
    assert folded(rows, names) == [("layer1-3.*.conv.weight", "3")]
    assert [name for name, _ in folded(rows)] == [
        "layer1.0-2.conv.weight", "layer2.0-3.conv.weight", "layer3.0-5.conv.weight",
    ]  # fmt: skip
    partly = [row for row in rows if row[0] != "layer2.3.conv.weight"]
    assert folded(partly, names) == [
        ("layer1-2.0-2.conv.weight", "3"), ("layer3.0-5.conv.weight", "3"),
    ]  # fmt: skip


class Joined(nn.Module):
    """Two widths that meet as the groups of a norm: parts born in no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.norm, self.out = nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(torch.cat([self.one(x), self.two(x)], 1)))


def test_groups_are_called_after_parameters_each_by_a_name_of_its_own() -> None:
    plan = mk.inspect(Joined(), torch.randn(2, 3, 5, 5), nesting="sliced")
    names = [group.name for group in plan.groups]
    owners = {name.partition(".")[0] for name in names}
    assert owners <= {"one", "two", "norm", "out"} and len(set(names)) == len(names)


def test_a_remark_that_comes_for_every_axis_is_told_once() -> None:
    remarks = ["a: x", *(f"demoted: w{i} stays whole" for i in range(9)), "a: y"]
    assert told(remarks) == ["a: x", "demoted: w0 stays whole (and 8 more like it)", "a: y"]


def test_columns_are_cut_in_the_middle() -> None:
    (line,) = columns([("first." * 20 + "end", "7", "x" * 50)], 60)
    assert len(line) <= 60 and line.startswith("first.") and ".." in line
