"""Blocks whose slice is their own class at half the width: what shrinks, and what stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matryoshkafy as mk
from tests.plan import small_class
from tests.plan.test_counts import SMALL, WIDTH, Net
from tests.zoo.registry import Scale

HEADS, UNITS = 4, 4


class TwoDims(nn.Module):
    """Weights hold heads and their units as two dims: heads leave, their units stay (XLNet)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        shape = (s(WIDTH), s(HEADS), UNITS)
        made = (nn.Parameter(torch.randn(shape) / 4) for _ in range(4))
        self.q, self.k, self.v, self.o = made

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bld,dhu->blhu", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bihu,bjhu->bhij", q, k).softmax(-1)
        return x + torch.einsum(
            "bihu,dhu->bid", torch.einsum("bhij,bjhu->bihu", weights, v), self.o
        )


class Gated(nn.Module):
    """Four numbers for each of two gates of a head, added up (WavLM's relative positions)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(UNITS, 8), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, UNITS))
        one, other = self.gate(heads).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, -1)
        return self.out((heads * one + other).flatten(-2))


class Fourier(nn.Module):
    """The real part of a transform over the positions and the width (FNet)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.fft.fftn(x, dim=(1, 2)).real)


class Masked(nn.Module):
    """A mask of each sample is repeated for every head (open_clip), scores are written in place:
    the run of every sample's heads ends where it does, at another batch, too (RecFormer).
    """

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.heads = s(HEADS)
        self.qkv, self.out = nn.Linear(s(WIDTH), 3 * s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        mask = x.new_ones(n, length, length).tril().repeat_interleave(self.heads, 0)
        q, k, v = (
            part.view(n, length, self.heads, UNITS).transpose(1, 2).flatten(0, 1)
            for part in self.qkv(x).chunk(3, -1)
        )
        scores = q.new_full((q.shape[0], length, length), -1e9)
        scores[:, :, :-1], scores[: -self.heads, :, -1] = q @ k[:, :-1].mT, 0.0
        scores = scores.masked_fill(mask == 0, -1e9)
        mixed = (scores.softmax(-1) @ v).view(n, self.heads, length, UNITS)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Typed(nn.Module):
    """Types of positions are read off zeros that are shaped like the stream (GIT)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.types = nn.Embedding(2, s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.types(torch.zeros_like(x, dtype=torch.long)[..., 0])


BLOCKS = (TwoDims, Gated, Fourier, Masked, Typed)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_slice_is_the_class_at_half_the_width(block: type[nn.Module]) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    model, native = (Net(block, w).double().eval() for w in (WIDTH, SMALL))
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced", check=False)
    small = mk.slice(doll, 0.5)
    native.load_state_dict(small.state_dict())
    for call in (x, torch.randn(3, 5, 3, dtype=torch.float64)):
        with torch.no_grad():
            torch.testing.assert_close(small(call), native(call), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_laws_of_masked_nesting_hold(block: type[nn.Module]) -> None:
    x = torch.randn(2, 7, 3)
    mk.convert(Net(block, WIDTH).eval(), (x,), sizes=[0.5, 1.0], nesting="masked", check=True)


class Mixture(nn.Module):
    """Rows are sorted by expert, and as many as each got are put together again (JetMoE)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.route = nn.Linear(s(WIDTH), 3)
        self.experts = nn.Parameter(torch.randn(3, s(WIDTH), s(WIDTH)) / 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.route(rows).argmax(-1)
        order = chosen.argsort(stable=True)
        counts = F.one_hot(chosen, 3).sum(0).tolist()
        pieces = rows[order].split(counts)
        made = torch.cat([F.linear(p, w) for p, w in zip(pieces, self.experts, strict=True)])
        return x + torch.zeros_like(rows).index_add(0, order, made).view_as(x)


def test_pieces_of_lengths_that_only_a_call_knows_keep_their_width() -> None:
    plan = mk.inspect(Net(Mixture, WIDTH).eval(), (torch.randn(2, 7, 3),), nesting="sliced")
    experts = [g for g in plan.groups if "block.experts:1" in g.parameters]
    assert [g.size for g in experts] == [WIDTH], plan.unknown


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_pieces_of_lengths_that_only_a_call_knows_convert(nesting: str) -> None:
    torch.manual_seed(0)
    model, x = Net(Mixture, WIDTH).eval().double(), torch.randn(2, 7, 3, dtype=torch.float64)
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting=nesting)
    small = mk.slice(doll, 0.5)
    native = Net(Mixture, SMALL).eval().double()
    native.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(x), doll.outputs(x)[doll.sizes[0]], rtol=1e-9, atol=1e-11)
        if nesting == "sliced":
            torch.testing.assert_close(small(x), native(x), rtol=1e-9, atol=1e-11)


class Stacked(nn.Module):
    """Attention whose heads are split and stacked on the batch, as in the code of SASRec."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.table = heads, nn.Embedding(30, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        x = self.table(ids)
        q, k, v = (torch.cat(f(x).chunk(self.heads, 2), 0) for f in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(1, 2) / k.size(-1) ** 0.5, -1)
        mixed = torch.cat((scores @ v).chunk(self.heads, 0), 2)
        return self.head(self.norm(x + mixed))


def test_a_width_of_equal_parts_is_named_whole() -> None:
    doll, error = small_class.moved(Stacked, 32, 8)
    assert error < 1e-12
    assert doll.sizes == [8, 32]
    assert doll.plan.groups[doll.plan.main].size == 8  # of each of four heads
