"""What a forward does in training mode alone is followed, or said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk


class Encoder(nn.Module):
    """A transformer encoder: dropout inside and outside fused attention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.first = nn.Linear(5, 16)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 5] -> [N, T, 16]"""
        return self.layers(self.first(x))


class AttentionOnly(nn.Module):
    """Dropout nowhere but in fused attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.qkv, self.last = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 5] -> [N, T, 3]"""
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        rate = 0.5 if self.training else 0.0
        return self.last(F.scaled_dot_product_attention(q, k, v, dropout_p=rate))


class Weighed(nn.Module):
    """torch's own attention, layer by layer, which gives its weights unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        layer = nn.MultiheadAttention
        self.layers = nn.ModuleList(
            layer(16, 4, dropout=p, batch_first=True) for p in (0.3, 0, 0.5)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, T, 5] -> [N, T, 3], weights [N, T, T]"""
        x = self.first(x)
        for layer in self.layers:
            y, weights = layer(x, x, x)
            x = x + y
        return self.last(x), weights


class Noisy(nn.Module):
    """Noise in training mode, and running statistics that a forward in that mode moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        h = self.norm(self.first(x))
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
        return self.last(h)


def tokens() -> Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))


def with_seed(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return module(x)


@pytest.mark.parametrize("make", [lambda: Encoder(0.3), AttentionOnly], ids=["encoder", "fused"])
def test_a_sliced_doll_trains_as_the_model_with_the_same_random_numbers(make) -> None:
    model, x = make().train(), tokens()
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert doll.training
    assert torch.equal(with_seed(doll, x), with_seed(model, x))
    doll.eval(), model.eval()
    assert torch.equal(doll(x), model(x))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_attention_that_gives_its_weights_drops_them_as_the_model(nesting: str) -> None:
    model, x = Weighed().train(), tokens()
    doll = mk.convert(model, (x,), sizes=[4, 8, 16], nesting=nesting)
    assert not [r for r in doll.plan.remarks if "random" in r]
    small = mk.slice(doll, 4).train()
    assert not torch.equal(small(x)[0], small(x)[0])
    if nesting == "sliced":
        for found, expected in zip(with_seed(doll, x), with_seed(model, x), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(doll.eval()(x), model.eval()(x), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_a_slice_drops_attention_in_training_mode_alone(nesting: str) -> None:
    x = tokens()
    doll = mk.convert(AttentionOnly(), (x,), sizes=[0.5, 1.0], nesting=nesting)
    small = mk.slice(doll, doll.sizes[0]).train()
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_a_saved_doll_still_follows(tmp_path) -> None:
    x = tokens()
    mk.save(mk.convert(AttentionOnly(), (x,), sizes=[0.5, 1.0]), tmp_path / "doll")
    loaded = mk.load(tmp_path / "doll").train()
    assert not torch.equal(loaded(x), loaded(x))


def test_no_dropout_leaves_no_remark() -> None:
    assert not mk.inspect(Encoder(0.0), (tokens(),)).remarks
    assert not mk.inspect(Encoder(0.3), (tokens(),)).remarks


def test_noise_of_training_mode_alone_is_said_with_its_line() -> None:
    model, x = Noisy(), torch.randn(6, 5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    plan = mk.inspect(model, (x,))
    assert any("randn_like" in r and "test_training_mode.py:" in r for r in plan.remarks)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_forward_that_fails_in_training_mode_is_said() -> None:
    plan = mk.inspect(Noisy(), (torch.randn(1, 5),))
    assert any("fails on the example inputs in training mode" in r for r in plan.remarks)


IN_PLACE = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


@pytest.mark.parametrize("layer", IN_PLACE, ids=lambda kind: kind.__name__)
def test_dropout_in_place_follows_the_mode(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), layer(inplace=True), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert not doll.plan.remarks
    for training in (False, True):
        answers = []
        for each in (doll.train(training), model.train(training)):
            torch.manual_seed(0)
            answers.append(each(x))
        torch.testing.assert_close(*answers)
