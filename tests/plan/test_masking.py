"""What masked nesting does at each node, and that values and gradients keep the prefix law."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.errors import NothingNests

LADDER = [2, 4, 8]


class Chain(nn.Module):
    """Linear layers alone, with small whole weights: every sum is exact."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(3, 8), nn.Linear(8, hidden)
        self.down, self.head = nn.Linear(hidden, 8), nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randint(-3, 4, p.shape, generator=generator).double()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        x = self.first(x)
        return self.head(x + self.down(F.relu(self.up(x))))


def whole() -> Tensor:
    return torch.randint(-3, 4, (6, 3), generator=torch.Generator().manual_seed(1)).double()


def doll_of(model: nn.Module, x: Tensor, **options: str) -> Doll:
    return mk.convert(model, (x,), sizes=LADDER, **options)  # type: ignore[arg-type]


def levels(n: int) -> Tensor:
    """Return the level of each of n units: a group keeps ceil(n m / 8) of them at size m."""
    ends = [-(-n * m // 8) for m in LADDER]
    return torch.tensor([sum(i >= end for end in ends) for i in range(n)])


def masked(weight: Tensor) -> Tensor:
    """Return weight[o, i] where level(o) >= level(i), else zero, as the paper's operator has it."""
    return weight * (levels(weight.shape[0])[:, None] >= levels(weight.shape[1])[None, :])


def test_the_full_model_is_the_masked_one_exactly() -> None:
    model, x = Chain(), whole()
    h = model.first(x)
    hidden = F.relu(F.linear(h, masked(model.up.weight), model.up.bias))
    expected = model.head(h + F.linear(hidden, masked(model.down.weight), model.down.bias))
    assert torch.equal(doll_of(model, x)(x), expected)


@pytest.mark.parametrize("size", LADDER)
def test_each_size_is_the_sliced_masked_one_exactly(size: int) -> None:
    model, x = Chain(), whole()
    doll, wide = doll_of(model, x), -(-12 * size // 8)
    h = F.linear(x, model.first.weight[:size], model.first.bias[:size])
    up, down = masked(model.up.weight)[:wide, :size], masked(model.down.weight)[:size, :wide]
    inner = F.linear(F.relu(F.linear(h, up, model.up.bias[:wide])), down, model.down.bias[:size])
    expected = F.linear(h + inner, model.head.weight[:, :size], model.head.bias)
    assert torch.equal(mk.slice(doll, size)(x), expected)
    assert torch.equal(doll.outputs(x)[size], expected)


@pytest.mark.parametrize("size", LADDER[:-1])
def test_gradients_of_a_prefix_ignore_what_lies_beyond(size: int) -> None:
    model, x = Chain(), whole()
    doll = doll_of(model, x)
    doll.outputs(x)[size].square().sum().backward()
    wide = -(-12 * size // 8)
    assert model.first.weight.grad is not None and model.up.weight.grad is not None
    assert not model.first.weight.grad[size:].any() and model.first.weight.grad[:size].any()
    assert not model.up.weight.grad[wide:].any() and not model.up.weight.grad[:, size:].any()
    before = model.first.weight.grad[:size].clone()
    with torch.no_grad():
        model.first.weight[size:] += 100
        model.up.weight[wide:] -= 100
        model.down.weight[:size, wide:] += 7
    doll.zero_grad()
    doll.outputs(x)[size].square().sum().backward()
    assert torch.equal(model.first.weight.grad[:size], before)


@pytest.mark.parametrize("size", LADDER)
def test_gradients_are_those_of_the_sub_model(size: int) -> None:
    model, x = Chain(), whole()
    doll = doll_of(model, x)
    small = mk.slice(doll, size)
    small(x).square().sum().backward()
    doll.outputs(x)[size].square().sum().backward()
    for name, p in small.named_parameters():
        full = dict(doll.named_parameters())[name].grad
        mine = p.grad
        assert full is not None and mine is not None
        part = full[tuple(slice(0, n) for n in mine.shape)]
        kept = part != 0
        assert torch.equal(part[kept], mine[kept]), name


class Normed(nn.Module):
    """A layer norm over the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3, 8).double(), nn.LayerNorm(8).double()
        self.head = nn.Linear(8, 5).double()
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        return self.head(self.norm(self.first(x)))


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("norm", ["block", "prefix"])
def test_a_norm_takes_statistics_of_its_block_or_prefix(norm: str) -> None:
    model, x = Normed(), whole()
    doll = doll_of(model, x, norm=norm)
    h, starts = model.first(x), [0, *LADDER[:-1]]
    blocks = zip(starts, LADDER, strict=True)
    parts = [
        standardised(h[:, (a if norm == "block" else 0) : b])[:, -(b - a) :] for a, b in blocks
    ]
    normed = torch.cat(parts, -1) * model.norm.weight + model.norm.bias
    torch.testing.assert_close(doll(x), model.head(normed), rtol=1e-12, atol=1e-12)
    for size, out in doll.outputs(x).items():
        expected = F.linear(normed[:, :size], model.head.weight[:, :size], model.head.bias)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_readout_is_the_tail() -> None:
    plan = doll_of(Chain(), whole()).plan
    kinds = sorted(a.kind for a in plan.actions.values())
    assert kinds == ["mask", "mask", "readout"] and len(plan.tail) == 1


class Mixer(nn.Module):
    """Widths that end in whole axes inside the trunk: a linear over a flattened sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.mix = nn.Linear(3, 8).double(), nn.Linear(8, 4).double()
        self.wide, self.last = nn.Linear(4, 8).double(), nn.Linear(8, 8).double()
        self.after, self.head = nn.Linear(8, 8).double(), nn.Linear(8, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        order = self.mix(F.relu(self.first(x))).flip(-1)
        y = torch.tanh(self.wide(order))
        y = y + torch.tanh(self.last(y))
        return self.head(y + torch.tanh(self.after(y)))


def test_a_width_that_ends_inside_the_trunk_is_said() -> None:
    model, x = Mixer(), whole()
    doll = doll_of(model, x)
    assert any("clamp" in r or "demoted" in r for r in doll.plan.remarks)
    assert mk.verify(doll, (x,)).passed


def test_noise_beyond_a_prefix_moves_nothing() -> None:
    """Written by hand, without the library's own noise."""
    model, x = Chain(), whole()
    doll = doll_of(model, x)
    before = {s: out.clone() for s, out in doll.outputs(x).items()}
    noisy = copy.deepcopy(model)
    for name, size in (("first", 2), ("up", 3), ("down", 2)):
        layer = noisy.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data[size:] += 50
        layer.bias.data[size:] -= 9
    noisy.head.weight.data[:, 2:] += 5
    other = doll_of(noisy, x)
    assert torch.equal(other.outputs(x)[2], before[2])
    assert not torch.equal(other.outputs(x)[4], before[4])


class Counted(nn.Module):
    """0, 1, 2, ... added to units that changed places: [h, d] -> [d, h]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, 12).double(), nn.Linear(12, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        h = self.first(x).view(x.shape[0], -1, 3).transpose(1, 2).reshape(x.shape[0], 12)
        return self.head(h + 0.01 * torch.arange(12, dtype=torch.float64))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_a_range_along_units_that_changed_places_keeps_them_whole(nesting: str) -> None:
    # A prefix of h in [d, h] is no prefix of 0..11: the one honest answer is that nothing nests.
    with pytest.raises(NothingNests, match=r"range \(.* first at .*test_masking.py:"):
        mk.convert(Counted(), (whole(),), sizes=[0.5, 1.0], nesting=nesting)


class Square(nn.Module):
    """A square weight read by a matmul: both of its dims are one group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, 8).double(), nn.Linear(8, 5).double()
        self.inner = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        x = self.first(x)
        return self.head(x + x @ self.inner)


def test_a_square_weight_of_a_matmul_is_masked() -> None:
    model, x = Square(), whole()
    doll = doll_of(model, x)
    assert mk.verify(doll, (x,)).passed
    h = model.first(x)
    expected = model.head(h + h @ masked(model.inner.t()).t())
    torch.testing.assert_close(doll(x), expected, rtol=1e-12, atol=1e-12)


class Rendered(nn.Module):
    """Three colours of a weight that each sample scales: a group of channels for each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.style = nn.Linear(3, 16), nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(3, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 3] -> [N, 3, L]"""
        x = self.first(x).tanh()
        n, length, width = x.shape
        weight = self.weight * self.style(x.mean(1)).view(n, 1, width, 1)
        inputs = x.mT.reshape(1, n * width, length)
        out = F.conv1d(inputs, weight.reshape(-1, width, 1), groups=n)
        return out.view(n, 3, length)


def test_a_width_beside_the_batch_is_cut_at_any_batch() -> None:
    x = torch.randn(2, 7, 3)
    doll = mk.convert(Rendered(), (x,), sizes=[0.5, 1.0])
    small = mk.slice(doll, doll.sizes[0])
    for batch in (1, 2, 5):
        x = torch.randn(batch, 7, 3)
        torch.testing.assert_close(doll.outputs(x)[doll.sizes[0]], small(x))
        assert small(x).shape == (batch, 3, 7)


class Sides(nn.Module):
    """Every unit by what all of them say of it: one side of a square is summed, one stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, width)
        self.kernel = nn.Parameter(torch.randn(width, width))
        self.hidden, self.head = nn.Linear(width, width // 4), nn.Linear(width // 4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N] -> [N, 5]"""
        x = self.table(ids)
        pairs = (x.unsqueeze(1) * self.kernel).sum(-1)
        return self.head(self.hidden(x + pairs).tanh())


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_of_a_square_the_summed_side_alone_is_cut(nesting: str) -> None:
    ids = torch.arange(5)
    doll = mk.convert(Sides(16), (ids,), sizes=[8, 16], nesting=nesting)  # type: ignore[arg-type]
    small, native = mk.slice(doll, 8), Sides(8)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(ids), native(ids))
    torch.testing.assert_close(doll.outputs(ids)[8], small(ids))


class Rows(nn.Module):
    """Rows of a table, normalised before or after they are looked up."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = before
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        if self.before:
            return self.head(F.embedding(ids, F.normalize(self.table.weight, dim=-1)))
        return self.head(F.normalize(self.table(ids), dim=-1))


def test_rows_are_normalised_over_their_own_units_before_they_are_looked_up() -> None:
    ids = torch.arange(10).view(2, 5)
    ours, theirs = (
        mk.convert(Rows(before).double(), (ids,), sizes=[4, 8, 16], nesting="masked")
        for before in (True, False)
    )
    for size in ours.sizes:
        torch.testing.assert_close(ours.outputs(ids)[size], theirs.outputs(ids)[size])
        torch.testing.assert_close(mk.slice(ours, size)(ids), theirs.outputs(ids)[size])


class Gathered(nn.Module):
    """The matrix of one of three experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.route, self.head = nn.Embedding(30, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.experts = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        x = self.table(ids)
        gate, best = self.route(x).softmax(-1).max(-1)
        mixed = torch.einsum("btd,btde->bte", x, self.experts[best])
        return self.head(x + mixed * gate[..., None])


def test_a_dim_that_is_whole_going_out_masks_nothing() -> None:
    ids = torch.arange(10).view(2, 5)
    doll = mk.convert(Gathered().double(), (ids,), sizes=[4, 8, 16], nesting="masked")
    (masks,) = [m for node in doll.plan.masks.values() for m in node.values() if m[0].into == 2]
    assert [mask.out for mask in masks] == [3]
    for call in (ids, ids[:1], torch.arange(28).view(4, 7)):
        for size in doll.sizes:
            torch.testing.assert_close(doll.outputs(call)[size], mk.slice(doll, size)(call))
