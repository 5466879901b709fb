"""What the plan decides beyond axes: masks, what sub-models store, in which order units stand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.axes.dims import Nested
from matryoshkafy.plan.plan import Mask, Plan, Stored, plan_from_dict, plan_to_dict
from matryoshkafy.plan.stored import decided


class Tower(nn.Module):
    """A table that is also the head, one square layer, one that is read twice, a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.square, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.square(self.table(ids)))
        x = torch.relu(self.twice(x)) @ self.twice.weight
        return x @ self.table.weight.t()


def planned() -> tuple[mk.Doll, Plan]:
    doll = mk.convert(Tower(), (torch.tensor([[1, 2]]),), sizes=[2, 4, 8])
    return doll, doll.plan


def test_masks_and_what_is_stored() -> None:
    _, plan = planned()
    width = (Nested(0, 8),)
    assert plan.stored["square.weight"] == Stored((width, width), Mask(0, 1))
    assert plan.stored["table.weight"] == Stored(((9,), width))
    assert "unused.weight" not in plan.stored
    (masks,) = (m for m in plan.masks.values() if "square_weight" in str(m))
    assert list(masks.values()) == [(Mask(0, 1),)]
    # Its two readers mask it in two ways, so that no zeros can be written out.
    assert plan.stored["twice.weight"].mask is None


def test_the_plan_alone_says_what_a_slice_holds() -> None:
    doll, plan = planned()
    small = mk.slice(doll, 4)
    assert list(small.state_dict()) == list(plan.stored)
    square = doll.get_parameter("square.weight").detach()[:4, :4].clone()
    square[:2, 2:] = 0
    assert torch.equal(small.get_parameter("square.weight"), square)


def test_format_1_is_completed_from_the_graph() -> None:
    doll, plan = planned()
    old = {k: v for k, v in before_3(plan).items() if k not in NEW} | {"format": 1}
    read = plan_from_dict(json.loads(json.dumps(old)))
    assert not read.stored and not read.masks
    assert decided(doll._trace, read) == plan


NEW = {"masks", "stored", "order", "blocks"}


def before_3(plan: Plan) -> dict[str, Any]:
    """A plan as formats 1 and 2 have it: one tensor's dims as they are, a word before several."""
    saved: dict[str, Any] = plan_to_dict(plan)
    nodes = {
        name: (outputs or [[]])[0] if len(outputs) < 2 else {"many": outputs}
        for name, outputs in saved["nodes"].items()
    }
    return saved | {"format": 2, "nodes": nodes}


def test_format_2_has_a_word_before_several_outputs() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).chunk(2, -1)
            return self.last(a * torch.sigmoid(b))

    plan = mk.inspect(Split(), (torch.randn(2, 4),), sizes=[0.5, 1.0])
    old = before_3(plan)
    assert any(isinstance(v, dict) for v in old["nodes"].values())
    assert plan_from_dict(json.loads(json.dumps(old))) == plan
    assert Plan.from_json(plan.to_json()) == plan


def test_format_3_round_trips_whole() -> None:
    plan = planned()[1]
    group = plan.groups[0].name
    plan = replace(plan, order={group: tuple(range(7, -1, -1))}, blocks=(("relu",), ("linear",)))
    assert Plan.from_json(plan.to_json()) == plan
