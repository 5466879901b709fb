"""A width that ends inside the trunk and meets a width again: every level has its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from tests.plan.models import CASES, ITEMS, Case, SlotAttention, history, points

SIZES = [2, 4, 8]


class OneHead(nn.Module):
    """Attention of one head between a table and a tied readout; no constant of the width."""

    fused = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, L, ITEMS]"""
        x = self.items(ids)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
        else:
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            scores = (q @ k.transpose(-1, -2) * 0.5).masked_fill(~causal, -1e9)
            mixed = F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        return self.norm(x + self.out(mixed)) @ self.items.weight.t()


class Fused(OneHead):
    """The same in one op."""

    fused = True


class Packed(nn.Module):
    """torch's own attention with one head: q, k and v are one packed weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, 5]"""
        x = self.items(ids)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


KINDS = {
    "by hand": Case(OneHead, history),
    "fused": Case(Fused, history),
    "packed": Case(Packed, history),
    "slots": Case(SlotAttention, points),
}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_held_back_and_the_smallest_size_is_the_class(name: str) -> None:
    case = KINDS[name]
    inputs = case.inputs()
    doll = mk.convert(case.model(8), inputs, sizes=SIZES)
    assert any(r.startswith("per size") for r in doll.plan.remarks)
    assert not any(r.startswith(("clamp", "demoted")) for r in doll.plan.remarks)
    assert mk.verify(doll, inputs).passed
    small, native = mk.slice(doll, 2), case.model(2)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(*inputs), native(*inputs), rtol=1e-10, atol=1e-12)


def test_a_level_attends_with_its_own_prefix_of_queries_and_keys() -> None:
    """The value of each level, in plain arithmetic on the weights that a level may read."""
    model: Any = KINDS["by hand"].model(8)
    doll = mk.convert(model, history(), sizes=SIZES)
    (ids,) = history()
    x, ends = model.items(ids), [0, *SIZES]
    level = torch.tensor([sum(i >= m for m in SIZES) for i in range(8)])
    keep = (level[:, None] >= level[None, :]).double()
    q, k, v = (F.linear(x, p.weight * keep, p.bias) for p in (model.query, model.key, model.value))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    blocks, normed = [], []
    for lo, hi in zip(ends, ends[1:], strict=False):
        scores = (q[..., :hi] @ k[..., :hi].mT * 0.5).masked_fill(~causal, -1e9)
        blocks.append(scores.softmax(-1) @ v[..., lo:hi])
    y = x + F.linear(torch.cat(blocks, -1), model.out.weight * keep, model.out.bias)
    for lo, hi in zip(ends, ends[1:], strict=False):
        weight, bias = model.norm.weight[lo:hi], model.norm.bias[lo:hi]
        normed.append(F.layer_norm(y[..., lo:hi], (hi - lo,), weight, bias))
    expected = torch.cat(normed, -1) @ model.items.weight.t()
    torch.testing.assert_close(doll(ids), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["by hand", "packed"])
def test_every_weight_of_queries_and_keys_learns(name: str) -> None:
    """What a clamp would leave dead: units beyond the smallest size have gradients."""
    case = KINDS[name]
    doll = mk.convert(case.model(8), case.inputs(), sizes=SIZES)
    doll(*case.inputs()).square().sum().backward()
    grads = {n: p.grad for n, p in doll.named_parameters() if "bias" not in n}
    queries = [g for n, g in grads.items() if "query" in n or "in_proj" in n]
    assert queries and all(g is not None and bool((g[2:8].abs().sum(1) > 0).all()) for g in queries)


def test_a_slice_of_a_slice_and_a_saved_one(tmp_path: object) -> None:
    doll = mk.convert(CASES["slots"].model(8), points(), sizes=SIZES)
    middle = mk.slice(doll, 4)
    mk.save(middle, f"{tmp_path}/middle")
    again = mk.slice(mk.load(f"{tmp_path}/middle"), 2)
    assert torch.equal(again(*points()), mk.slice(doll, 2)(*points()))
    assert torch.equal(mk.load(f"{tmp_path}/middle")(*points()), middle(*points()))
    assert torch.equal(copy.deepcopy(middle)(*points()), middle(*points()))


@pytest.mark.parametrize("name", ["bert4rec", "perceiver", "mmssl"])
def test_a_statistic_kept_at_full_length_is_saved_and_loaded(name: str, tmp_path: object) -> None:
    case = CASES[name]
    doll = mk.convert(case.model(8), case.inputs(), sizes=SIZES)
    mk.save(doll, f"{tmp_path}/doll")
    loaded = mk.load(f"{tmp_path}/doll", size=4)
    assert torch.equal(loaded(*case.inputs()), mk.slice(doll, 4)(*case.inputs()))
