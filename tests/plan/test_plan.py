"""The plan: which axes nest, in which groups, what stays whole and why; its text and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError, NothingNests, PlanError
from matryoshkafy.plan.plan import Plan


class Recommender(nn.Module):
    """Item ids to scores over a tied table, attention with grouped heads, a gated block."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.items = nn.Embedding(30, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.gate, self.down = nn.Linear(width, 2 * 24), nn.Linear(24, width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, 30]"""
        x = self.items(ids) * math.sqrt(self.items.embedding_dim)
        n, length, _ = x.shape
        q = self.query(x).view(n, length, -1, self.dim).transpose(1, 2)
        k, v = self.key_value(x).view(n, length, 2, -1, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(y))
        a, b = self.gate(x).chunk(2, -1)
        x = x + self.down(F.silu(a) * b)
        return x[:, -1] @ self.items.weight.t()


def ids() -> Tensor:
    return torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return mk.inspect(Recommender(), (ids(),), sizes=[4, 8, 16], nesting="sliced")


def shapes_at(size: int) -> dict[str, tuple[int, ...]]:
    model = Recommender()
    doll = mk.convert(model, (ids(),), sizes=[4, 8, 16], nesting="sliced")
    return {n: tuple(p.shape) for n, p in mk.slice(doll, size).named_parameters()}


def test_width_and_sizes(plan: Plan) -> None:
    assert plan.width == 16 and list(plan.sizes) == [4, 8, 16]
    assert [plan.level(s) for s in plan.sizes] == [0, 1, 2]


def test_shapes_of_the_half() -> None:
    """Half of 16 units, of 4 query heads, of 2 shared heads, of 24 hidden units."""
    assert shapes_at(8) == {
        "items.weight": (30, 8), "query.weight": (8, 8), "query.bias": (8,),
        "key_value.weight": (8, 8), "key_value.bias": (8,), "out.weight": (8, 8), "out.bias": (8,),
        "norm.weight": (8,), "norm.bias": (8,), "gate.weight": (24, 8), "gate.bias": (24,),
        "down.weight": (8, 12), "down.bias": (8,),
    }  # fmt: skip


def test_groups_follow_the_ratio_rounded_up(plan: Plan) -> None:
    for group, *widths in zip(plan.groups, *plan.ladder, strict=True):
        assert widths == [max(1, math.ceil(group.size * s / 16)) for s in plan.sizes]


def test_what_stays_whole_says_why(plan: Plan) -> None:
    reasons = {w.axis: w.why for w in plan.whole}
    assert reasons["items.weight:0"] == "vocabulary"
    assert "inner" in reasons.values()


def test_the_scale_by_the_root_of_the_width_is_found(plan: Plan) -> None:
    (scalar,) = plan.scalars
    assert (scalar.value, scalar.units, scalar.power) == (4.0, 16, 0.5)
    assert scalar.at(8) == pytest.approx(math.sqrt(8))


def test_the_scale_is_rewritten() -> None:
    model = Recommender().double()
    doll = mk.convert(model, (ids(),), sizes=[4, 8, 16], nesting="sliced")
    small = mk.slice(doll, 8)
    native = Recommender(8, 2).double()
    native.gate, native.down = nn.Linear(8, 24).double(), nn.Linear(12, 8).double()
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(ids()), native(ids()), rtol=1e-12, atol=1e-12)


def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_format_2_is_read_tensor_by_tensor(plan: Plan) -> None:
    saved = json.loads(plan.to_json())
    nodes = {"scalar": [], "one": [[2], [3]], "two": {"many": [[[2]], []]}}
    read = Plan.from_json(json.dumps(saved | {"format": 2, "nodes": nodes}))
    two, three = (2,), (3,)
    assert read.nodes == {"scalar": ((),), "one": ((two, three),), "two": ((two,), ())}


def test_it_reads_as_a_table(plan: Plan) -> None:
    text = str(plan)
    assert all(group.name in text for group in plan.groups)
    assert "vocabulary" in text and "16" in text


def test_a_size_that_is_not_there_lists_those_that_are(plan: Plan) -> None:
    with pytest.raises(PlanError, match="4, 8, 16"):
        plan.level(7)


def test_what_is_kept_stays_whole() -> None:
    kept = mk.inspect(Recommender(), (ids(),), sizes=[4, 8, 16], nesting="sliced", keep=["down"])
    assert all(w.why != "kept" or w.axis.startswith(("down", "gate", "items")) for w in kept.whole)
    assert "kept" in {w.why for w in kept.whole}


def test_keep_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="matches no"):
        mk.inspect(Recommender(), (ids(),), keep=["decoder"])


def test_overrides_give_a_group_its_widths() -> None:
    model = Recommender()
    names = {g.size: g.name for g in mk.inspect(model, (ids(),), nesting="sliced").groups}
    doll = mk.convert(
        model, (ids(),), sizes=[4, 8, 16], nesting="sliced", overrides={names[24]: [20, 22, 24]}
    )
    assert mk.slice(doll, 4).get_parameter("down.weight").shape == (4, 20)


def test_scope_ffn_nests_hidden_axes_only() -> None:
    doll = mk.convert(
        Recommender(), (ids(),), sizes=[0.25, 0.5, 1.0], scope="ffn", nesting="sliced"
    )
    shapes = {n: tuple(p.shape) for n, p in mk.slice(doll, doll.sizes[0]).named_parameters()}
    assert shapes["down.weight"] == (16, 6) and shapes["items.weight"] == (30, 16)


def test_an_op_without_a_rule_freezes_what_it_touches() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.last(torch.special.entr(self.first(x)))))

    plan = mk.inspect(Model(), (torch.rand(2, 4),), nesting="sliced")
    assert [u.op for u in plan.unknown] == ["special_entr"]
    assert "test_plan.py" in plan.unknown[0].source
    assert "unknown op" in {w.why for w in plan.whole}
    assert [g.size for g in plan.groups] == [6]


def test_a_model_without_a_width_is_refused() -> None:
    with pytest.raises(NothingNests):
        mk.inspect(nn.Linear(4, 3), (torch.rand(2, 4),))
    with pytest.raises(MatryoshkafyError):
        mk.inspect(nn.ReLU(), (torch.rand(2, 4),))


@pytest.mark.parametrize("change", [
    {"format": 99}, {"sizes": []}, {"sizes": [8, 4, 16]}, {"main": 50}, {"ladder": [[0]]},
    {"groups": []},
    {"stored": {"a": {"dims": [["g9:4"]]}}}, {"stored": {"a": {"dims": [[4]], "mask": [0, 1]}}},
    {"order": {"items.weight:1": [0, 0]}}, {"order": {"strange": [0]}},
    {"parameters": {"a": [["g9:4"]]}}, {"parameters": 3}, {"nodes": None},
])  # fmt: skip
def test_a_damaged_plan_is_refused(plan: Plan, change: dict[str, object]) -> None:
    data = json.loads(plan.to_json()) | change
    with pytest.raises(MatryoshkafyError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", "{", '{"format": 1}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(MatryoshkafyError):
        Plan.from_json(text)


class TwoClasses(nn.Module):
    """Two classes that pass a residual unit, as the head of a U-Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.classes = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 2, 1)
        self.again = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 1, H, W] -> [N, 2, H, W]"""
        y = self.classes(F.relu(self.first(x)))
        return y + self.again(y)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_two_classes_stay_two_though_a_residual_unit_reads_them(nesting: str) -> None:
    x = torch.randn(2, 1, 5, 5)
    doll = mk.convert(TwoClasses(), (x,), sizes=[8, 16], nesting=nesting)
    assert doll.outputs(x)[8].shape == (2, 2, 5, 5)
    assert mk.slice(doll, 8).get_parameter("classes.weight").shape == (2, 8, 1, 1)


class Capped(nn.Module):
    """Logits that are bounded, before they are returned: cap * tanh(logits / cap)."""

    def __init__(self, inside: float, outside: float) -> None:
        super().__init__()
        self.inside, self.outside = inside, outside
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4] -> [N, 24]"""
        return torch.tanh(self.last(F.relu(self.first(x))) / self.inside) * self.outside


@pytest.mark.parametrize(("outside", "left"), [(15.0, 24), (3.0, 12)])
def test_bounded_logits_stay_whole_and_a_squashed_representation_does_not(
    outside: float, left: int
) -> None:
    x = torch.randn(2, 4)
    doll = mk.convert(Capped(15.0, outside), (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert mk.slice(doll, doll.sizes[0])(x).shape == (2, left)


class Ending(nn.Module):
    """A representation that ends in an operation of one's own."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(4, 16), nn.Linear(16, 24), end

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4] -> [N, 24]"""
        return self.end(self.last(F.relu(self.first(x))))


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize(
    ("end", "left"),
    [
        (lambda y: y.softmax(-1), 24),
        (lambda y: F.log_softmax(y / 2.0, dim=1), 24),
        (torch.sigmoid, 24),
        (lambda y: F.normalize(y, dim=-1), 12),
        (torch.tanh, 12),
    ],
)
def test_shares_of_classes_stay_whole_and_embeddings_nest(
    end: Callable[[Tensor], Tensor], left: int, nesting: str
) -> None:
    x = torch.randn(2, 4)
    doll = mk.convert(Ending(end), (x,), sizes=[0.5, 1.0], nesting=nesting)
    assert mk.slice(doll, doll.sizes[0])(x).shape == (2, left)


def test_an_input_that_holds_the_width_is_told_with_the_remedy() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    x = (torch.randn(2, 3, 16),)
    (said,) = [r for r in mk.inspect(layer, x).remarks if r.startswith("whole width")]
    assert "input 'src'" in said and "free=['src']" in said
    assert not [r for r in mk.inspect(layer, x, free=["src"]).remarks if "whole width" in r]
    small = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 5))
    assert not mk.inspect(small, (torch.randn(2, 3),)).remarks
