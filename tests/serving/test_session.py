"""Extending an answer gives what one pass at the larger size gives, and computes only the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import matryoshkafy as mk
from matryoshkafy.axes.dims import minus
from matryoshkafy.serving import Session
from matryoshkafy.serving.pieces import order_of
from matryoshkafy.serving.vectors import ServingError


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 64, heads: int = 8, *, causal: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.position = nn.Parameter(torch.randn(12, width))
        self.blocks = nn.ModuleList([Block(width, heads, causal) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50)

    def forward(self, ids):
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide, self.norm = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.silu(self.wide(self.deep(x))).mean((2, 3)))


def gated() -> nn.Module:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.norm = nn.Linear(12, 32), nn.RMSNorm(32)
            self.both, self.out = nn.Linear(32, 96), nn.Linear(48, 32)
            self.head = nn.Linear(32, 5)

        def forward(self, x):
            x = self.inward(x)
            gate, up = self.both(self.norm(x)).chunk(2, -1)
            return self.head(x + self.out(F.silu(gate) * up))

    return Gated()


class Bare(nn.Module):
    """Linear layers without a bias, and one whose input is a cat: its units lie in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(12, 16, bias=False) for _ in range(2))
        self.both, self.out = nn.Linear(32, 16, bias=False), nn.Linear(16, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.both(torch.cat([self.a(x), self.b(x).sin()], -1))))


def doll_of(name: str, norm: str) -> tuple[mk.Doll, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs, sizes = {
        "encoder": (Transformer(), torch.randint(50, (3, 10)), "8..64"),
        "decoder": (Transformer(causal=True), torch.randint(50, (2, 12)), "16..64:16"),
        "few heads": (Transformer(heads=2), torch.randint(50, (2, 7)), "32,64"),
        "convolutions": (Convolutional(), torch.randn(2, 3, 8, 8), [0.25, 0.5, 1.0]),
        "gated": (gated(), torch.randn(4, 12), "8..32"),
        "bare": (Bare(), torch.randn(4, 12), "4..16"),
    }[name]
    model = model.double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return mk.convert(model, (inputs,), sizes=sizes, nesting="masked", norm=norm), (inputs,)


CASES = ["encoder", "decoder", "few heads", "convolutions", "gated", "bare"]


@pytest.mark.parametrize("norm", ["block", "prefix"])
@pytest.mark.parametrize("name", CASES)
def test_an_extended_answer_is_that_of_one_pass(name: str, norm: str) -> None:
    doll, inputs = doll_of(name, norm)
    with torch.no_grad():
        wanted = dict(doll.outputs(*inputs).items())
    session = Session(doll)
    first = session.answer(*inputs, size=doll.sizes[0])
    torch.testing.assert_close(first, wanted[doll.sizes[0]], rtol=1e-12, atol=1e-12)
    for size in doll.sizes[1:]:
        torch.testing.assert_close(session.extend(size), wanted[size], rtol=1e-12, atol=1e-12)
        assert session.size == size
    straight = Session(doll).answer(*inputs, size=doll.sizes[-1])
    torch.testing.assert_close(straight, wanted[doll.sizes[-1]], rtol=1e-12, atol=1e-12)


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def test_an_extension_costs_the_difference() -> None:
    doll, inputs = doll_of("encoder", "block")
    small, large = (mk.slice(doll, size) for size in (16, 64))
    session = Session(doll)
    first = flops(lambda: session.answer(*inputs, size=16))
    more = flops(lambda: session.extend(64))
    alone = {16: flops(lambda: small(*inputs)), 64: flops(lambda: large(*inputs))}
    head = 2 * inputs[0].numel() * 50 * 16  # logits of the small size, computed again
    assert first <= alone[16]
    assert more <= 1.1 * (alone[64] - alone[16]) + head


def test_new_inputs_forget_the_old_ones() -> None:
    doll, inputs = doll_of("gated", "block")
    session = Session(doll)
    session.answer(*inputs, size=32)
    other = torch.randn(2, 12).double()
    session.answer(other, size=8)
    with torch.no_grad():
        torch.testing.assert_close(session.extend(32), doll(other), rtol=1e-12, atol=1e-12)
    assert session.cached_bytes() > 0


def test_pieces_are_what_a_level_adds_in_natural_order() -> None:
    assert minus(((0, 4), (8, 12)), ((0, 2), (8, 9))) == ((2, 4), (9, 12))
    assert minus(((0, 4), (8, 12)), ((0, 4),)) == ((8, 12),)
    assert minus(((0, 9),), ((1, 2), (4, 5))) == ((0, 1), (2, 4), (5, 9))
    # Two sums of widths 1, 2, 4: the order of what three levels added, side by side.
    assert order_of((((0, 1), (4, 5)), ((1, 2), (5, 6)), ((2, 4), (6, 8)))) == (
        (0, 1), (2, 3), (4, 6), (1, 2), (3, 4), (6, 8),
    )  # fmt: skip
    assert order_of((((0, 2),), ((2, 4),), ((4, 8),))) == ((0, 8),)


def test_under_autocast_an_extension_is_that_of_one_pass() -> None:
    doll, inputs = doll_of("encoder", "block")
    doll, session = doll.float(), Session(doll.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        session.answer(*inputs, size=8)
        wanted = doll.outputs(*inputs)[64]
        torch.testing.assert_close(session.extend(64), wanted, rtol=0.05, atol=0.05)


def test_weights_that_changed_are_read_anew() -> None:
    doll, inputs = doll_of("gated", "block")
    session = Session(doll)
    session.answer(*inputs, size=8)
    with torch.no_grad():
        doll.head.weight.mul_(2)
        torch.testing.assert_close(session.answer(*inputs, size=32), doll(*inputs))


def test_what_cannot_be_extended_is_refused() -> None:
    doll, inputs = doll_of("gated", "block")
    session = Session(doll)
    with pytest.raises(ServingError, match="extend was called before answer"):
        session.extend(32)
    session.answer(*inputs, size=16)
    with pytest.raises(ServingError, match="an answer only grows"):
        session.extend(8)
    with pytest.raises(mk.MatryoshkafyError, match="sizes 8, 16, 32"):
        session.extend(20)
    sliced = mk.convert(gated(), (torch.randn(4, 12),), sizes="8..32", nesting="sliced")
    with pytest.raises(ServingError, match='only nesting="masked"'):
        Session(sliced)


def test_a_fused_recurrence_is_refused_by_name() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.GRU(6, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0])

    doll = mk.convert(Recurrent(), (torch.randn(2, 5, 6),), sizes="4..16", nesting="masked")
    with pytest.raises(ServingError, match="gru computes all units in one recurrence"):
        Session(doll)
