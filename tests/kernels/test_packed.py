"""Packed storage: inverses, the prefix property, the product, and the state_dict at the border."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels import reference, tiling
from matryoshkafy.kernels.packed import PackedLinear, pack, packed_linear, unpack

RUNS = {
    "doubling": [2, 0, 2, 1, 4, 2, 8, 3],
    "packed": [2, 0, 3, 1, 2, 0, 3, 1, 2, 0, 3, 1],
    "down and up": [3, 2, 1, 0, 2, 1, 4, 2, 1, 0],
    "gaps": [2, 1, 0, 3, 3, 5],
}


def integers(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=g).double()


def length(runs):
    return sum(runs[::2])


@pytest.fixture(
    params=[tiling.Cost(1e-12, 1e9, 1e15), tiling.Cost(1e3, 1e15, 1e15)], ids=["fine", "merged"]
)
def cost(request, monkeypatch):
    monkeypatch.setattr(tiling, "COSTS", {})
    monkeypatch.setattr(tiling, "DEFAULT", request.param)
    tiling.tiling.cache_clear()
    yield
    tiling.tiling.cache_clear()


@pytest.mark.parametrize("out", RUNS)
@pytest.mark.parametrize("inner", RUNS)
def test_unpack_is_the_inverse_of_pack(out, inner):
    out_runs, in_runs = RUNS[out], RUNS[inner]
    w = integers(length(out_runs), length(in_runs))
    masked = reference.mask(w, 0, 1, out_runs, in_runs)
    flat = pack(w, out_runs, in_runs)
    assert torch.equal(unpack(flat, out_runs, in_runs), masked)
    everywhere = reference.mask(torch.ones_like(w), 0, 1, out_runs, in_runs)
    assert len(flat) == everywhere.sum()


def test_a_smaller_model_is_a_prefix():
    runs = RUNS["doubling"]
    w = integers(16, 16)
    flat = pack(w, runs, runs)
    for m, levels in ((2, 1), (4, 2), (8, 3)):
        short = pack(w[:m, :m], runs[: 2 * levels], runs[: 2 * levels])
        assert torch.equal(flat[: len(short)], short)
    wide = [8 * n if k % 2 == 0 else n for k, n in enumerate(runs)]
    assert len(pack(integers(128, 128), wide, wide)) / 128**2 < 0.68


@pytest.mark.parametrize("out", RUNS)
@pytest.mark.parametrize("inner", RUNS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (1,)])
def test_product(cost, out, inner, shape):
    out_runs, in_runs = RUNS[out], RUNS[inner]
    x = integers(*shape, length(in_runs), seed=1).requires_grad_()
    w = integers(length(out_runs), length(in_runs)).requires_grad_()
    b = integers(length(out_runs), seed=2).requires_grad_()
    flat = pack(w, out_runs, in_runs)
    y, expected = (
        packed_linear(x, flat, b, out_runs, in_runs),
        reference.linear(x, w, b, out_runs, in_runs),
    )
    assert torch.equal(y, expected)
    slope = integers(*y.shape, seed=3)
    found = torch.autograd.grad(y, (x, w, b), slope)
    assert all(map(torch.equal, found, torch.autograd.grad(expected, (x, w, b), slope)))


def test_module_shows_dense_names(cost):
    runs = RUNS["doubling"]
    linear = nn.Linear(16, 16).double()
    layer = PackedLinear.from_linear(linear, runs, runs)
    assert [name for name, _ in layer.named_parameters()] == ["packed", "bias"]
    state = nn.Sequential(layer).state_dict()
    assert sorted(state) == ["0.bias", "0.weight"]
    assert torch.equal(state["0.weight"], reference.mask(linear.weight, 0, 1, runs, runs))
    other = nn.Sequential(PackedLinear(runs, runs, dtype=torch.float64))
    other.load_state_dict(state)
    assert torch.equal(other[0].packed, layer.packed)
    x = integers(4, 16)
    expected = reference.linear(x, linear.weight, linear.bias, runs, runs)
    torch.testing.assert_close(layer(x), expected)


def test_missing_keys_are_reported():
    layer = PackedLinear([4, 0], [4, 0])
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.zeros(4)})


def test_training_step_equals_the_masked_one():
    runs = RUNS["doubling"]
    linear = nn.Linear(16, 16).double()
    layer = PackedLinear.from_linear(linear, runs, runs)
    x = integers(8, 16)
    for module, run in ((layer, layer), (linear, None)):
        y = run(x) if run else reference.linear(x, linear.weight, linear.bias, runs, runs)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0)
        y.square().mean().backward()
        optimizer.step()
    stepped = reference.mask(linear.weight, 0, 1, runs, runs)
    torch.testing.assert_close(layer.state_dict()["weight"], stepped.detach())


def test_autocast():
    layer = PackedLinear([4, 0, 4, 1], [4, 0, 4, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 8))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.packed.grad.dtype == torch.float32


def test_messages():
    with pytest.raises(MatryoshkafyError, match="the packed weight of these runs has 12"):
        packed_linear(torch.zeros(1, 4), torch.zeros(11), None, [2, 0, 2, 1], [2, 0, 2, 1])
    with pytest.raises(MatryoshkafyError, match="no double backward"):
        x = torch.zeros(1, 4, requires_grad=True)
        y = packed_linear(x, torch.zeros(12), None, [2, 0, 2, 1], [2, 0, 2, 1])
        torch.autograd.grad(y.sum(), x, create_graph=True)
