"""Drawings are checked by their arithmetic: areas and ends of what is drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.report import pictures
from matryoshkafy.report.pictures.svg import sized, tag, text
from matryoshkafy.report.pictures.tradeoffs import Point

SVG = "{http://www.w3.org/2000/svg}"


class Residual(nn.Module):
    """A residual layer with a hidden axis, whose weights are drawn below."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return x + self.down(torch.relu(self.up(x)))


def plan_of(nesting: str) -> mk.Plan:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    return mk.convert(Residual(), (ids,), sizes=[4, 8, 16], nesting=nesting).plan


def rectangles(drawing: str) -> list[dict[str, float]]:
    found = ElementTree.fromstring(drawing).iter(f"{SVG}rect")
    return [
        {k: float(r.attrib[k]) for k in ("x", "y", "width", "height")}
        | {"level": int(r.attrib["data-level"])}
        for r in found
        if "data-level" in r.attrib
    ]


def area(rects: list[dict[str, float]]) -> float:
    return sum(r["width"] * r["height"] for r in rects)


def test_a_masked_weight_is_drawn_as_its_blocks() -> None:
    # Levels of 4, 4 and 8 of 16 units: 1/4 * 1/4 + 1/4 * 1/2 + 1/2 * 1 of the square.
    masked = area(rectangles(pictures.weight(plan_of("masked"), "up.weight")))
    whole = area(rectangles(pictures.weight(plan_of("sliced"), "up.weight")))
    assert masked / whole == pytest.approx(1 / 16 + 1 / 8 + 1 / 2, rel=1e-3)


def test_what_a_size_holds_of_a_weight_is_its_corner() -> None:
    rects = rectangles(pictures.weight(plan_of("sliced"), "down.weight"))
    inside = [r for r in rects if r["level"] <= 1]
    assert area(inside) / area(rects) == pytest.approx(1 / 4, rel=1e-3)


def test_the_layer_drawn_is_the_largest_of_which_both_axes_nest() -> None:
    assert pictures.drawn_layer(plan_of("masked")) in ("up.weight", "down.weight")


def test_each_group_is_a_bar_whose_pieces_end_at_its_widths() -> None:
    plan = plan_of("masked")
    rows: dict[float, list[float]] = {}
    for r in rectangles(pictures.groups(plan)):
        rows.setdefault(r["y"], []).append((r["x"] + r["width"]) / 400)
    assert len(rows) == len(plan.groups)
    assert all(ends == pytest.approx([0.25, 0.5, 1.0]) for ends in rows.values())


def test_bars_stand_for_their_values() -> None:
    drawing = pictures.bars({4: 10.0, 8: 20.0, 16: 40.0}, str, "bytes by size")
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawing)]
    assert heights == pytest.approx([30, 60, 120])


def test_lines_put_equal_values_at_equal_heights() -> None:
    series = {"a": {4: 1.0, 8: 2.0}, "b": {4: 2.0, 8: 3.0}}
    drawing = pictures.lines(series, [4, 8], "accuracy by size")
    lines = [line.split() for line in re.findall(r'points="([^"]+)"', drawing)]
    (a4, a8), (b4, b8) = ([tuple(map(float, p.split(","))) for p in line] for line in lines)
    assert a8[1] == b4[1] and a4[0] == b4[0]
    assert a4[1] - a8[1] == pytest.approx(b4[1] - b8[1], abs=0.11)


def test_a_line_of_one_value_is_drawn() -> None:
    assert "<polyline" in pictures.lines({"": {4: 0.5}}, [4], "accuracy")


def circles(drawing: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(drawing).iter(f"{SVG}circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found]


def test_costs_far_apart_are_drawn_by_their_ratios() -> None:
    points = [Point(cost, value, "m") for cost, value in ((1e3, 0.5), (1e4, 0.7), (1e6, 0.9))]
    (a, low), (b, _), (c, high) = circles(pictures.tradeoff({"": points}, str, "accuracy"))
    # Decades: one from a to b, two from b to c; half of the values below the middle one.
    assert (c - b) / (b - a) == pytest.approx(2, rel=1e-3)
    assert high < low
    near = [Point(cost, cost, "m") for cost in (1.0, 2.0, 3.0)]
    (a, _), (b, _), (c, _) = circles(pictures.tradeoff({"": near}, str, "accuracy"))
    assert b - a == pytest.approx(c - b)


def test_one_choice_and_equal_costs_are_drawn() -> None:
    for points in ([Point(5.0, 0.5, "a")], [Point(5.0, 0.5, "a"), Point(5.0, 0.6, "b")],
                   [Point(0.0, 0.5, "a"), Point(9.0, 0.5, "b")]):  # fmt: skip
        places = circles(pictures.tradeoff({"": points}, str, "accuracy"))
        assert len(places) == len(points)
        assert all(0 <= x <= 300 and 0 <= y <= 166 for x, y in places)


def test_the_line_of_a_series_ascends_in_cost_and_its_marks_know_their_level() -> None:
    points = [Point(30.0, 0.9, "16", 2), Point(10.0, 0.5, "4", 0), Point(20.0, 0.7, "8", 1)]
    drawing = pictures.tradeoff({"": points}, str, "accuracy")
    (line,) = re.findall(r'points="([^"]+)"', drawing)
    ends = [float(pair.split(",")[0]) for pair in line.split()]
    assert ends == sorted(ends)
    assert re.findall(r'data-level="(\d)"', drawing) == ["0", "1", "2"]


class Deep(nn.Module):
    """Layers that repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(ids) for layer in self.layers]).sum(0)


def test_groups_of_layers_that_repeat_are_one_bar() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    plan = mk.inspect(Deep(), (ids,), sizes=[4, 8, 16])
    drawing = pictures.groups(plan)
    assert len({r["y"] for r in rectangles(drawing)}) == 2 < len(plan.groups)
    assert "layers.0-2.up.out" in drawing


def test_a_drawing_is_shown_at_its_own_size() -> None:
    assert '<svg width="300" ' in sized(pictures.tradeoff({"": [Point(1, 1, "")]}, str, "a"))


def test_words_are_escaped() -> None:
    assert text("<script>", 0, 0) == '<text x="0" y="0">&lt;script&gt;</text>'
    assert tag("g", title='"x"') == '<g title="&quot;x&quot;"></g>'


def test_a_standalone_drawing_is_valid_xml_with_its_colours() -> None:
    drawing = pictures.standalone(pictures.groups(plan_of("masked")))
    assert ElementTree.fromstring(drawing).find(f"{SVG}style") is not None
