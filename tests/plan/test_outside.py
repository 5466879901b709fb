"""Models of other people's structure: slices equal the natively small class, in both nestings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import PlanError
from matryoshkafy.plan.plan import Plan
from tests.plan.models import CASES, FrozenText, LightGcn, UniSRec, bipartite, history, pairs

WIDTH, SMALL = 8, 4
# Masked nesting keeps the constants of the full model, here the root of the width of one head.
ONE_HEAD = {"sasrec", "sasrec of torch"}
# A masked doll of the latter is refused.
BOTH = [(n, s) for n in CASES for s in ("sliced", "masked") if (n, s) != ("spectral", "masked")]
NATIVE = [(n, s) for n, s in BOTH if s == "sliced" or n not in ONE_HEAD]


@pytest.mark.parametrize(("name", "nesting"), NATIVE)
def test_the_smallest_slice_is_the_native_class(name: str, nesting: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    doll = mk.convert(case.model(WIDTH), inputs, sizes=[SMALL, WIDTH], nesting=nesting)
    small, native = mk.slice(doll, SMALL), case.model(SMALL)
    native.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), native(*inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "nesting"), BOTH)
def test_every_law_holds(name: str, nesting: str) -> None:
    inputs = CASES[name].inputs()
    doll = mk.convert(CASES[name].model(WIDTH), inputs, sizes=[SMALL, 6, WIDTH], nesting=nesting)
    report = mk.verify(doll, inputs)
    assert report.passed, report


def test_a_number_made_of_all_of_a_weight_is_refused_in_masked_nesting() -> None:
    model, inputs = CASES["spectral"].model(WIDTH), CASES["spectral"].inputs()
    with pytest.raises(PlanError, match=r"one number of all of .*hidden\..*nesting=\"sliced\""):
        mk.convert(model, inputs, nesting="masked")


class Deeper(nn.Module):
    """A spectral norm among layers that have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CASES["spectral"].model(WIDTH)
        self.more = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 7] -> [N, L, 3]"""
        return self.more(self.model(x))


def test_what_the_refusal_of_a_spectral_norm_says_to_keep_helps() -> None:
    model, inputs = Deeper().double().eval(), CASES["spectral"].inputs()
    with pytest.raises(PlanError, match="one number of all of") as caught:
        mk.convert(model, inputs, sizes=[0.5, 1.0], nesting="masked")
    named = str(caught.value).partition("keep=['")[2].partition("'")[0]
    doll = mk.convert(model, inputs, sizes=[0.5, 1.0], nesting="masked", keep=[named]).eval()
    assert mk.verify(doll, inputs).passed
    small = mk.slice(doll, 0.5)
    assert len(small.state_dict()["more.0.weight"]) < WIDTH


def reasons(plan: Plan) -> dict[str, str]:
    return {w.axis: w.why for w in plan.whole}


@pytest.mark.parametrize("kind", [UniSRec, FrozenText])
def test_features_that_do_not_train_stay_whole_with_a_reason(kind: type[nn.Module]) -> None:
    plan = mk.inspect(kind(WIDTH).double(), history(), nesting="sliced")
    assert [w.size for w in plan.whole if w.why == "frozen table"] == [48]
    assert plan.width == WIDTH


class Slots(nn.Module):
    """Seven rows of a table, attended or (without the softmax) as hidden units of tied weights."""

    def __init__(self, width: int, *, attended: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.table = nn.Linear(3, width), nn.Parameter(torch.randn(7, width))
        self.head, self.attended = nn.Linear(width, 5), attended

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        x = self.first(x)
        scores = x @ F.normalize(self.table, dim=-1).T
        weights = scores.softmax(-1) if self.attended else scores.relu()
        return self.head(x + weights @ self.table)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_rows_that_are_keys_and_values_stay_whole(nesting: str) -> None:
    x = (torch.randn(2, 3),)
    attended = mk.inspect(Slots(WIDTH, attended=True), x, nesting=nesting)
    tied = mk.inspect(Slots(WIDTH, attended=False), x, nesting=nesting)
    assert reasons(attended)["table:0"] == "table rows" and "table:0" not in reasons(tied)


def test_a_graph_in_a_buffer_does_not_make_items_nest() -> None:
    doll = mk.convert(LightGcn(WIDTH).double(), pairs(), sizes=[SMALL, WIDTH], nesting="sliced")
    state = mk.slice(doll, SMALL).state_dict()
    assert state["adjacency"].shape == bipartite().shape
    assert state["items.weight"].shape == (23, SMALL)


class Adapted(nn.Module):
    """A frozen backbone with one trained low-rank adapter, as in LoRA."""

    def __init__(self, *, frozen: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.requires_grad_(not frozen)
        self.down = nn.Parameter(torch.randn(WIDTH, 4))
        self.up = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, 5]"""
        x = self.words(ids)
        x = x + F.gelu(self.layer(x) + x @ (self.down @ self.up))
        return self.head(x.mean(1))


def test_a_frozen_backbone_nests() -> None:
    """Its layers are weights, and its word table belongs to the stream that they write."""
    ids = torch.randint(0, 11, (2, 3))
    adapted = mk.inspect(Adapted(), (ids,), nesting="sliced")
    trained = mk.inspect(Adapted(frozen=False), (ids,), nesting="sliced")
    assert [g.size for g in adapted.groups] == [g.size for g in trained.groups]
    assert "frozen table" not in reasons(adapted).values()


def test_a_wholly_frozen_model_nests() -> None:
    model = FrozenText(WIDTH).requires_grad_(False)
    assert mk.inspect(model.double(), history(), nesting="sliced").width >= WIDTH
    small = mk.slice(
        mk.convert(Adapted().requires_grad_(False), (torch.ones(2, 3, dtype=torch.long),),
                   sizes=[SMALL, WIDTH], nesting="sliced"), SMALL
    )  # fmt: skip
    assert small.get_parameter("words.weight").shape == (11, SMALL)


class Shuffled(nn.Module):
    """Towers over a frozen table and over ids, written in an order of one's own."""

    text: Tensor

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("text", torch.randn(23, 12))
        self.items = nn.Embedding(23, WIDTH)
        self.project, self.gate = nn.Linear(12, WIDTH), nn.Linear(12, WIDTH)
        self.first, self.second = nn.Linear(2 * WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, 23]"""
        values: dict[int, Tensor] = {}
        made = {
            0: lambda: self.items(ids),
            1: lambda: self.project(self.text[ids]),
            2: lambda: self.gate(self.text).sigmoid(),
            3: lambda: F.normalize(self.items.weight, dim=-1),
        }
        for step in self.order:
            values[step] = made[step]()
        x = self.second(F.gelu(self.first(torch.cat([values[0], values[1]], -1)))).mean(1)
        return x @ (values[3] * values[2]).t()


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_what_nests_does_not_depend_on_the_order_of_statements(nesting: str) -> None:
    ids = torch.randint(0, 23, (2, 3))
    seen = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)):
        plan = mk.inspect(Shuffled(order), (ids,), nesting=nesting)
        shapes = {
            name: tuple(tuple(map(str, dim)) for dim in dims)
            for name, dims in sorted(plan.parameters.items())
        }
        seen.add(str((plan.width, plan.sizes, shapes)))
    assert len(seen) == 1


class Counting(nn.Module):
    """Returns its width in several forms, and constants that are none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> tuple[object, ...]:
        """ids [N, T] -> logits, the width, its root, itself in a tensor, ones of its shape; 5, 0.3,
        as many ones as there are ids
        """
        h = self.table(ids)
        width = h.shape[-1]
        counts = (width, math.sqrt(width), torch.tensor(width), torch.ones(h.shape))
        return (self.head(h), *counts, 5, 0.3, torch.ones(ids.shape))


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_an_output_that_counts_the_width_is_said(nesting: str) -> None:
    plan = mk.inspect(Counting(16), (torch.arange(10).view(2, 5),), sizes=[8, 16], nesting=nesting)
    said = [r.partition(" of the flat")[0] for r in plan.remarks if r.startswith("full width")]
    assert said == [f"full width: output {place}" for place in (1, 2, 3, 4)]
