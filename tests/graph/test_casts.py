"""A doll that is cast computes what the model computes when it is cast: the oracle is the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.caveats import OtherTypeWarning

WIDE = torch.float32
TYPES = [torch.float16, torch.bfloat16, torch.float64]


def rms(h: Tensor) -> Tensor:
    """LLaMA's: half would overflow."""
    kind = h.dtype
    h = h.to(torch.float32)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind)


def padded(h: Tensor) -> Tensor:
    """A first position of zeros."""
    return torch.cat([torch.zeros(h.shape[0], 1, h.shape[2]).to(h.dtype), h], 1)


def written(h: Tensor) -> Tensor:
    """Into memory of another type."""
    out = torch.zeros(h.shape[0], 2, h.shape[2]).to(h.dtype)
    out[:, 0] = h[:, 0]
    return out


def masked(h: Tensor) -> Tensor:
    """The least number of the type."""
    scores = h @ h.mT / 300
    return (
        scores.masked_fill(torch.eye(h.shape[1]).bool(), torch.finfo(h.dtype).min).softmax(-1) @ h
    )


def summed(h: Tensor) -> Tensor:
    """Into zeros of the type, which autocast may have lowered."""
    out = torch.zeros(h.shape[0], 4, h.shape[2], dtype=h.dtype)
    return out.index_add_(1, torch.tensor([0, 1, 0, 1, 2]), h)


def by_default(h: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """A type that an argument names."""
    wide = h.to(kind)
    return (wide / wide.square().mean(-1, keepdim=True).sqrt()).to(h.dtype)


def extended(h: Tensor) -> Tensor:
    """BERT's mask, made of positions."""
    mask = (torch.arange(h.shape[1]) < 3).to(h.dtype)
    return (h @ h.mT / 300 + (1.0 - mask) * torch.finfo(h.dtype).min).softmax(-1) @ h


def causal(h: Tensor) -> Tensor:
    """A decoder's mask."""
    scores = h @ h.mT / 300
    least = torch.full(scores.shape[-2:], torch.finfo(h.dtype).min, dtype=h.dtype)
    return (scores + least.triu(1)).softmax(-1) @ h


def running(h: Tensor) -> Tensor:
    """A state in float32, whatever the model's type."""
    u, state = h.float(), torch.zeros(h.shape[0], h.shape[2], dtype=torch.float32)
    states: list[Tensor] = []
    for t in range(5):
        state = 0.9 * state + u[:, t]
        states.append(state)
    return torch.stack(states, 1).to(h.dtype)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda h: ((h.float() * 9000).square() / 1e7).type_as(h),
    "the cast of a name": lambda h: ((h.to(WIDE) * 9000).square() / 1e7).to(h.dtype),
    "type": lambda h: ((h.type(torch.float32) * 9000).square() / 1e7).type(h.dtype),
    "softmax": lambda h: h * F.softmax(h, dim=1, dtype=torch.float32).to(h.dtype),
    "sum": lambda h: (h * 9).square().sum(1, dtype=torch.float32, keepdim=True).sqrt().to(h.dtype),
    "the value beside its cast": lambda h: h + rms(h * 300),
    "rms": lambda h: rms(h * 300),
    "zeros": padded,
    "written": written,
    "least": masked,
    "index_add": summed,
    "extended": extended,
    "causal": causal,
    "running": running,
    "named by a default": lambda h: by_default(h * 300),
}


class Net(nn.Module):
    """Values of a few units, and what a test makes of them."""

    def __init__(self, width: int, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.table, self.a, self.head = (
            nn.Embedding(30, width),
            nn.Linear(width, width),
            nn.Linear(width, 3),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, .., 3]"""
        return self.head(USES[self.use](self.a(self.table(ids)) * 3))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("use", USES)
def test_a_cast_doll_is_the_cast_model(use: str, dtype: torch.dtype) -> None:
    ids, model = torch.arange(10).view(2, 5), Net(16, use).eval()
    doll = mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced")
    small, native = mk.slice(doll, 8).to(dtype), Net(8, use).to(dtype).eval()
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(doll(ids), model(ids))
    doll, model = copy.deepcopy(doll).to(dtype), copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for ours, theirs in ((doll, model), (small, native)):
            expected = theirs(ids)
            assert expected.isfinite().all()
            # In float64 the doll stays there where the model goes through float32.
            rtol = 1e-4 if dtype == torch.float64 else 0
            torch.testing.assert_close(ours(ids), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", ["running", "rms", "extended", "float"])
def test_a_doll_of_float64_is_cast_as_well(use: str, dtype: torch.dtype) -> None:
    ids, model = torch.arange(10).view(2, 5), Net(16, use).double().eval()
    doll = mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced")
    torch.testing.assert_close(doll(ids), model(ids))
    with torch.no_grad():
        torch.testing.assert_close(doll.to(dtype)(ids), model.to(dtype)(ids), rtol=0, atol=0)


@pytest.mark.parametrize("use", USES)
def test_a_doll_under_autocast_is_the_model_under_it(use: str) -> None:
    ids, model = torch.arange(10).view(2, 5), Net(16, use).eval()
    doll = mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(doll(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize("use", ["rms", "least"])
def test_a_saved_doll_is_cast_as_well(use: str, tmp_path: Path) -> None:
    ids, model = torch.arange(10).view(2, 5), Net(16, use).eval()
    mk.save(mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced"), tmp_path / "doll")
    again = mk.load(tmp_path / "doll").half()
    with torch.no_grad():
        assert torch.equal(again(ids), model.half()(ids))


class Clamped(nn.Module):
    """T5 clamps in half alone."""

    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.table, self.a, self.ask = nn.Embedding(30, 16), nn.Linear(16, 16), ask

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 16]"""
        h = self.table(ids)
        return self.a(h.clamp(-1, 1) if self.ask(h) else h)


def _by_name(h: Tensor) -> bool:
    kind = h.dtype
    return kind in (torch.float16, torch.bfloat16)


ASKED: list[Callable[[Tensor], bool]] = [lambda h: h.dtype == torch.float16, _by_name]


def _warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, OtherTypeWarning)]


@pytest.mark.parametrize("ask", ASKED)
def test_a_branch_on_the_type_is_said_of_a_cast_doll(
    ask: Callable[[Tensor], bool], tmp_path: Path
) -> None:
    ids, model = torch.arange(10).view(2, 5), Clamped(ask).eval()
    doll = mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced")
    mk.save(doll, tmp_path / "doll")
    for each in (doll, mk.slice(doll, 8), mk.load(tmp_path / "doll")):
        assert not _warned(lambda each=each: each(ids))
        each.half()
        assert "test_casts.py" in _warned(lambda each=each: each(ids))[0]
        assert not _warned(lambda each=each: each(ids))


def test_a_type_that_is_no_question_is_not_said() -> None:
    ids = torch.arange(10).view(2, 5)

    def ask(h: Tensor) -> bool:
        return h.dtype == torch.long or h.dtype != torch.zeros(1, dtype=h.dtype).dtype

    doll = mk.convert(Clamped(ask).eval(), (ids,), sizes=[8, 16], nesting="sliced").half()
    assert not _warned(lambda: doll(ids))


class Rotated(nn.Module):
    """Angles of long positions, for which the forward turns autocast off, as transformers does."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.q, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.exact = exact
        self.register_buffer("inverse", 1 / 1e4 ** (torch.arange(0, 8, 2) / 8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        x = self.table(ids)
        n, t, _ = x.shape
        places = (torch.arange(t) * 301)[None]
        with torch.autocast("cpu", enabled=False):
            angles = (self.inverse[None, :, None].float() @ places[:, None].float()).transpose(1, 2)
            turn = torch.cat([angles, angles], -1)
            cos, sin = (f(turn).to(x.dtype)[:, :, None] for f in (torch.cos, torch.sin))
        h = self.q(x).view(n, t, -1, 8)
        first, second = h.chunk(2, -1)
        h = (h * cos + torch.cat([-second, first], -1) * sin).flatten(2)
        if self.exact:
            with torch.autocast("cpu", enabled=False):
                h = (h.float() @ h.float().mT) @ h.float()
        return self.head(h)


@pytest.mark.parametrize("exact", [False, True])
def test_where_a_forward_turns_autocast_off_is_kept_or_said(exact: bool) -> None:
    ids, model = torch.arange(14).view(2, 7), Rotated(exact).eval()
    doll = mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced")
    said = [r for r in doll.plan.remarks if r.startswith("autocast is turned off at")]
    assert bool(said) is exact
    with torch.no_grad():
        assert torch.equal(doll(ids), model(ids))
        if not exact:
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(doll(ids), model(ids), rtol=0, atol=0)


def test_a_type_that_is_asked_for_by_name_is_no_cast() -> None:
    class Named(Clamped):
        def forward(self, ids: Tensor) -> Tensor:
            h = self.table(ids)
            return self.a(h.type(self.a.weight.type()))

    ids, model = torch.arange(10).view(2, 5), Named(lambda h: False).eval()
    doll = mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced")
    assert torch.equal(doll(ids), model(ids))
