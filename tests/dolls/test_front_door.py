"""The front door: what may be given, in the fewest words, and what comes back."""

from __future__ import annotations

import copy
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.calls import Another, _method_of
from matryoshkafy.errors import PlanError, TraceError


class Config:
    """What a model says of itself."""

    hidden = 16


class Scorer(nn.Module):
    """Items scored for a bag of ids, with methods beside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.names, self.secret = Config(), ["a", "b"], [torch.ones(1)]
        self.items = nn.Embedding(11, 16)
        self.up, self.head = nn.Linear(16, 12), nn.Linear(12, 5)
        self.drop = nn.Dropout(0.5)

    def encode(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        h = torch.relu(self.up(self.items(ids)))
        return self.drop(h.mean(1) if weight is None else (h * weight[..., None]).sum(1))

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.head(self.encode(ids, weight))

    def predict(self, ids: Tensor) -> Tensor:
        return self(ids).softmax(-1)


class Bag(nn.Module):
    """A forward whose one argument is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scorer()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.inner(batch["ids"], batch["weight"])}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Scorer:
    torch.manual_seed(0)
    return Scorer().double().eval()


def widths(plan: mk.Plan) -> dict[str, list[int]]:
    return {g.name: [w[i] for w in plan.ladder] for i, g in enumerate(plan.groups)}


def test_the_front_door_is_small_and_complete() -> None:
    names = ("MatryoshkaLoss", "export", "example_inputs", "convert", "inspect", "slice", "verify")
    assert all(callable(getattr(mk, name)) for name in names)
    assert re.fullmatch(r"\d+\.\d+.*", mk.__version__)
    assert {*names, "load", "save", "Plan", "Doll"} <= {*dir(mk)}


def test_inspect_and_convert_have_equal_defaults(model: Scorer, ids: Tensor) -> None:
    plan, doll = mk.inspect(model, ids), mk.convert(model, ids)
    assert plan == doll.plan and len(doll.sizes) == 3
    options: dict[str, Any] = {"norm": "prefix", "keep": ["items"]}
    assert mk.inspect(model, ids, **options) == mk.convert(model, ids, **options).plan


def test_a_plan_is_looked_at_edited_and_applied(model: Scorer, ids: Tensor) -> None:
    plan = mk.inspect(model, ids, sizes=[4, 8, 16], nesting="sliced")
    name = next(g.name for g in plan.groups if g.size == 12)
    edited = plan.with_widths({name: [4, 10, 12]})
    doll = mk.convert(model, ids, plan=edited)
    assert widths(doll.plan)[name] == [4, 10, 12] and widths(plan)[name] == [3, 6, 12]
    small = mk.slice(doll, 8)
    assert small.up.weight.shape == (10, 8)
    hidden = F.linear(model.items.weight[ids, :8], model.up.weight[:10, :8], model.up.bias[:10])
    pooled = torch.relu(hidden).mean(1)
    expected = F.linear(pooled, model.head.weight[:, :10], model.head.bias)
    torch.testing.assert_close(small(ids), expected)
    assert mk.verify(doll, ids).passed


@pytest.mark.parametrize("option", [{"sizes": [4, 16]}, {"nesting": "sliced"}, {"keep": ["up"]}])
def test_a_plan_holds_the_options_already(
    model: Scorer, ids: Tensor, option: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match="a plan was given together with"):
        mk.convert(model, ids, plan=mk.inspect(model, ids), **option)


def test_the_plan_of_another_model_is_refused(model: Scorer, ids: Tensor) -> None:
    plan = mk.inspect(model, ids)
    other = Scorer()
    other.up, other.head = nn.Linear(16, 9), nn.Linear(9, 5)
    with pytest.raises(PlanError, match=r"does not fit this model: parameter '(head|up)\."):
        mk.convert(other, ids, plan=plan)
    with pytest.raises(PlanError, match="does not fit this model: value"):
        mk.convert(model, ids, plan=mk.inspect(model, ids, method="predict"))


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_inputs_by_name(model: Scorer, ids: Tensor, kind: type) -> None:
    weight = torch.rand(3, 4, dtype=torch.float64)
    batch = kind(ids=ids, weight=weight)
    doll = mk.convert(model, batch, sizes=[4, 16], nesting="sliced")
    assert torch.equal(doll(**batch), model(ids, weight))
    assert mk.verify(doll, batch).passed
    assert mk.inspect(model, batch, sizes=[4, 16], nesting="sliced") == doll.plan


def test_a_mapping_that_names_no_argument_is_one_input(ids: Tensor) -> None:
    batch = UserDict(ids=ids, weight=torch.rand(3, 4))
    model = Bag().eval()
    doll = mk.convert(model, batch, sizes=[4, 16], nesting="sliced")
    assert torch.equal(doll(dict(batch))["scores"], model(dict(batch))["scores"])
    assert mk.verify(doll, batch).passed


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
@pytest.mark.parametrize("method", ["predict", "encode"])
def test_another_method_is_converted(model: Scorer, ids: Tensor, nesting: str, method: str) -> None:
    before = copy.deepcopy(model.state_dict())
    doll = mk.convert(model, ids, sizes=[4, 8, 16], nesting=nesting, method=method)
    assert list(doll.state_dict()) == list(before)
    assert doll.up.weight is model.up.weight
    if nesting == "sliced":
        assert torch.equal(doll(ids), getattr(model, method)(ids))
    assert mk.verify(doll, ids).passed
    assert model(ids).shape == (3, 5) and "forward" not in vars(model)


def test_a_method_follows_the_mode_of_its_owner(model: Scorer, ids: Tensor) -> None:
    model.train()
    method = Another(model, _method_of(model, "predict"))
    assert method.training and method.config is model.config
    method.eval()
    assert not model.training and not model.drop.training
    twin = copy.deepcopy(method)
    twin.items.weight.data.zero_()
    assert model.items.weight.abs().sum() > 0
    torch.testing.assert_close(twin(ids), twin.owner.predict(ids))


def test_a_method_that_is_none_is_named(model: Scorer, ids: Tensor) -> None:
    with pytest.raises(TraceError, match=r"method='score' .* no such method.*encode, forward, pre"):
        mk.convert(model, ids, method="score")
    with pytest.raises(TraceError, match="a type was given as the model"):
        mk.convert(Scorer, ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_a_ratio_is_a_size(model: Scorer, ids: Tensor, nesting: str, tmp_path: Path) -> None:
    doll = mk.convert(model, ids, sizes=[4, 8, 16], nesting=nesting)
    half = mk.slice(doll, 0.5)
    assert torch.equal(half(ids), mk.slice(doll, 8)(ids))
    assert torch.equal(mk.slice(half, 0.25)(ids), mk.slice(doll, 4)(ids))
    mk.save(doll, tmp_path / "doll")
    assert torch.equal(mk.load(tmp_path / "doll", size=0.5)(ids), half(ids))
    with pytest.raises(PlanError, match=r"size 0.3 \(5 units\) .* sizes 4, 8, 16"):
        mk.slice(doll, 0.3)
    with pytest.raises(PlanError, match=r"size 1.5 was asked for; .* sizes 4, 8, 16\. .*above 1"):
        mk.slice(doll, 1.5)


def test_what_the_model_says_of_itself_reaches_through(model: Scorer, ids: Tensor) -> None:
    doll = mk.convert(model, ids, sizes=[4, 16])
    assert doll.config is model.config and doll.names == ["a", "b"]
    assert doll.device == torch.device("cpu") and doll.dtype == torch.float64
    assert doll.float().dtype == torch.float32
    for name in ("secret", "nowhere"):
        with pytest.raises(AttributeError, match=name):
            getattr(doll, name)
    assert copy.deepcopy(doll).names == ["a", "b"]


class Encoder(nn.Module):
    """Token values and a sentence embedding, as sentence-transformers returns them."""

    def __init__(self, *, unit: bool) -> None:
        super().__init__()
        self.table, self.out, self.unit = nn.Embedding(11, 24), nn.Linear(24, 16), unit

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        h = self.table(ids)
        pooled = self.out(h).mean(1)
        if self.unit:
            pooled = F.normalize(pooled, dim=-1)
        return {"token_embeddings": h, "sentence_embedding": pooled}


@pytest.mark.parametrize("unit", [False, True])
def test_output_scope_shortens_what_comes_out(tmp_path: Path, ids: Tensor, unit: bool) -> None:
    model = Encoder(unit=unit).double().eval()
    doll = mk.convert(model, ids, sizes=[4, 8, 16], scope="output")
    full = model(ids)["sentence_embedding"]
    mk.save(doll, tmp_path / "doll")
    for size in (4, 8, 16):
        expected = full[:, :size]
        if unit:
            expected = expected / expected.norm(dim=-1, keepdim=True)
        for small in (mk.slice(doll, size), mk.load(tmp_path / "doll", size=size)):
            found = small(ids)
            torch.testing.assert_close(found["sentence_embedding"], expected)
            assert found["token_embeddings"].shape == (3, 4, 24)
            again = mk.slice(small, 4)(ids)["sentence_embedding"]
            assert torch.equal(again, mk.slice(doll, 4)(ids)["sentence_embedding"])
        torch.testing.assert_close(doll.outputs(ids)[size]["sentence_embedding"], expected)
    assert torch.equal(doll(ids)["sentence_embedding"], full)
    assert mk.verify(doll, ids).passed


def test_hooks_run_where_the_guide_says() -> None:
    model, ran = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), list[str]()
    doll = mk.convert(model, torch.ones(2, 3), sizes=[4, 8], nesting="sliced")
    small = mk.slice(doll, 4)
    for name, part in (
        ("part", doll.get_submodule("0")),
        ("doll", doll),
        ("small", small),
        ("linear", small.get_submodule("0")),
    ):
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    doll(torch.ones(2, 3))
    assert ran == ["doll"]
    small(torch.ones(2, 3))
    assert ran == ["doll", "linear", "small"]
