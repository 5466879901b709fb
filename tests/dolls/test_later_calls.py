"""What a call leaves to the next ones: a graph is one call, so it is refused where it counts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import TraceError
from tests.graph.test_trials import Tagger, ids


class Base(nn.Module):
    """Two linears and a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.middle, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.double()
        self.kept: Any = None

    def hidden(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()

    def answer(self, h: Tensor) -> Tensor:
        return self.head(self.middle(h).tanh())


class Attribute(Base):
    """A statistic of the first call, kept as a plain attribute."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if self.kept is None:
            self.kept = h.mean().detach()
        return self.answer(h * self.kept)


class Cache(Base):
    """The same in a dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        self.kept = self.kept or {}
        if "mean" not in self.kept:
            self.kept["mean"] = h.mean().detach()
        return self.answer(h * self.kept["mean"])


class Stream(Base):
    """A state that every call hands to the next."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        h = h if self.kept is None else h + self.kept
        self.kept = h.mean(0, keepdim=True).detach()
        return self.answer(h)


class Counter(Base):
    """A number of calls."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = (self.kept or 0) + 1
        return self.answer(self.hidden(x) * self.kept)


class Normed(Attribute):
    """Two modes, which are looked at longer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Shown(Base):
    """Something is kept for others to read."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.hidden(x)
        return self.answer(self.kept)


class Positions(Base):
    """A table that depends on no value."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(16, dtype=torch.float64) / 16
        return self.answer(self.hidden(x) + self.kept)


class Filled(Base):
    """A buffer that the first call fills."""

    filled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filled", torch.zeros(16, dtype=torch.float64))


class Table(Filled):
    """The same table in a buffer, which the first call fills; the next ones take another path."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.filled.copy_(torch.arange(16, dtype=torch.float64) / 16)
            self.kept = True
        return self.answer(self.hidden(x) + self.filled)


class Clusters(Filled):
    """A buffer that the first call fills with what it computed, and the next ones read."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if not self.filled.any():
            self.filled.copy_(h.mean(0).detach())
        return self.answer(h - self.filled)


class Buffer(Base):
    """A running mean where a state belongs, which the plan's notes name."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.answer(h - self.mean)


class Trained(Base):
    """A running mean in a plain attribute, which training alone moves."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        out = self.answer(h - self.kept)
        if self.training:
            self.kept = 0.9 * self.kept + 0.1 * h.detach().mean(0)
        return out


class Building(Base):
    """A layer that is made when its inputs are known."""

    def hidden(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = nn.Linear(x.shape[-1], 16, dtype=x.dtype)
        return self.kept(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.hidden(x))


class Rarely(Counter):
    """A number of calls that shows in every fifth."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = (self.kept or 0) + 1
        return self.answer(self.hidden(x)) * (2 if self.kept % 5 == 0 else 1)


@cache
def ramp(length: int, width: int) -> Tensor:
    return torch.arange(length * width, dtype=torch.float64).view(length, width) / width


class Outside(Base):
    """A table that is kept outside of the module."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.answer(h + ramp(*h.shape[1:]))


def inputs() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def converted(model: nn.Module, **options: Any) -> mk.Doll:
    return mk.convert(model, inputs(), sizes=[4, 16], nesting="sliced", **options)


@pytest.mark.parametrize("kind", [Attribute, Cache, Stream, Counter, Normed])
def test_a_forward_that_lives_on_its_last_call_is_refused(kind: type[Base]) -> None:
    with pytest.raises(TraceError, match="keeps something of a call"):
        converted(kind().eval())


def test_the_attribute_is_named() -> None:
    with pytest.raises(TraceError, match=r"\(in 'kept'\).*register_buffer"):
        converted(Attribute())


def test_called_once_it_is_ready() -> None:
    model = Attribute().eval()
    model(inputs())
    doll = converted(model)
    other = inputs() * 2
    torch.testing.assert_close(doll(other), model(other), rtol=1e-12, atol=1e-12)


def test_a_first_call_of_its_own_is_refused() -> None:
    with pytest.raises(TraceError, match="its next call takes another path"):
        converted(Clusters().eval())


@pytest.mark.parametrize("kind", [Shown, Positions, Table, Buffer])
def test_what_no_later_call_depends_on_may_be_kept(kind: type[Base]) -> None:
    model = kind().eval()
    doll = converted(model)
    other = inputs() * 2
    torch.testing.assert_close(doll(other), model(other), rtol=1e-12, atol=1e-12)


def test_what_training_alone_keeps_refuses_training_alone() -> None:
    doll = converted(Trained())
    model = Trained().eval()
    torch.testing.assert_close(doll.eval()(inputs()), model(inputs()), rtol=1e-12, atol=1e-12)
    with pytest.raises(TraceError, match="keeps something of a call"):
        doll.train()


def test_a_memory_that_shows_at_other_values_alone() -> None:
    """The second call of the quick look is at one row and one token."""

    class Remembering(Tagger):
        first: Tensor | None = None

        def forward(self, ids: Tensor) -> Tensor:
            out = super().forward(ids)
            if self.first is None:
                self.first = out.detach().mean((0, 1))
            return out - self.first

    with pytest.raises(TraceError, match="keeps something of a call"):
        mk.convert(Remembering(), ids(), sizes=[4, 8], nesting="sliced")


@pytest.mark.parametrize("check", [True, False])
def test_layers_that_the_first_call_makes_are_refused_until_it_made_them(check: bool) -> None:
    model = Building().eval()
    with pytest.raises(TraceError, match=r"makes parameters \('kept.weight'.*call it once"):
        converted(model, check=check)
    model(inputs())
    doll = converted(model, check=check)
    torch.testing.assert_close(doll(inputs()), model(inputs()), rtol=1e-12, atol=1e-12)


def test_a_count_that_a_later_call_may_read_is_said() -> None:
    assert any("a call changes 'kept'" in remark for remark in converted(Rarely()).plan.remarks)
    assert not any("a call changes" in remark for remark in converted(Buffer()).plan.remarks)


@pytest.mark.parametrize("check", [True, False])
def test_what_is_kept_outside_of_the_module_is_of_a_real_call(check: bool) -> None:
    ramp.cache_clear()
    model = Outside().eval()
    example = inputs().view(2, 2, 6)
    doll = mk.convert(model, example, sizes=[4, 16], nesting="sliced", check=check)
    for other in (example * 2, torch.cat([example, example])):
        expected = model(other)
        assert type(expected) is Tensor
        torch.testing.assert_close(doll(other), expected, rtol=1e-12, atol=1e-12)
    assert type(model(torch.cat([example, example], 1))) is Tensor
