"""Law 8: gradients and training mode are the model's, or the doll says that they are not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import matryoshkafy as mk
from matryoshkafy.dolls import tracing
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.trace import Trace, trace

Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """Three layers, a body between the last two."""

    def __init__(self, body: Body | nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.last = nn.Linear(8, 3).double()
        self.body = body.double() if isinstance(body, nn.Module) else body

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        return self.last(self.body(self.first(x)))


def detached(h: Tensor) -> Tensor:
    return h * 2 + h.detach() * 3


def straight_through(h: Tensor) -> Tensor:
    return h + (h.round() - h).detach()


def stabilised(h: Tensor) -> Tensor:
    return torch.exp(h - h.amax(-1, keepdim=True).detach())


def without_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1 / h.std()
        shift = h.mean(0)
    return h * scale + shift


def inner_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = h * 3
    return a * b


KEPT = (detached, straight_through, stabilised, without_grad, inner_grad)


class Reverse(torch.autograd.Function):
    """Gradient reversal: the identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x -> x"""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """-grad"""
        return -grad


def reversed_(h: Tensor) -> Tensor:
    return Reverse.apply(h)  # type: ignore[return-value]


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda grad: grad * 5)
    return h


def hooked_step(h: Tensor) -> Tensor:
    h = h * 1
    if h.grad_fn is not None:
        h.grad_fn.register_hook(lambda given, _: tuple(g if g is None else 5 * g for g in given))
    return h


def repacked(h: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda saved: saved * 2, lambda packed: packed):
        return h * h


def example() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module) -> list[Tensor]:
    x = example().requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [*model.parameters(), x]))


def convert(model: nn.Module) -> mk.Doll:
    return mk.convert(model, (example(),), sizes=[0.5, 1.0], nesting="sliced")


@pytest.mark.parametrize("body", KEPT, ids=lambda b: b.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_what_stops_a_gradient_is_kept(body: Body, training: bool) -> None:
    model = Around(body).train(training)
    doll = convert(model)
    assert not doll.plan.remarks and doll.training == training
    for found, expected in zip(gradients(doll), gradients(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "body", [reversed_, hooked, hooked_step, repacked], ids=lambda b: b.__name__
)
def test_a_backward_that_a_trace_cannot_hold_is_refused(body: Body, tmp_path: Any) -> None:
    doll = convert(Around(body))
    remark = next(r for r in doll.plan.remarks if r.startswith("inference only"))
    assert body is not reversed_ or "Reverse" in remark
    assert not doll.training and not doll(example()).requires_grad
    with pytest.raises(TraceError, match="inference only"):
        doll.train()
    small = mk.slice(doll, doll.sizes[0])
    assert not small(example()).requires_grad
    with pytest.raises(TraceError, match="this sub-model cannot be trained; inference only"):
        small.train()
    with pytest.raises(TraceError, match="inference only"):
        mk.load(mk.save(doll, tmp_path / "doll")).train()


class Cancelling(nn.Module):
    """(x + a) + b, where a and b are large and all but cancel: float32 keeps three digits of x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("a", torch.full((8,), 3e4))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        return self.last(torch.tanh(self.first(x) + self.a + (0.5 - self.a)) ** 2)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_float32_rounds_away_is_judged_in_float64(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that adds in another order is the model; one that adds something else is not."""

    def reordered(*given: Any, **options: Any) -> Trace:
        found = trace(*given, **options)
        add = torch.ops.aten.add.Tensor
        first, second = found.graph.find_nodes(op="call_function", target=add)
        (x, a), b = first.args, second.args[1]
        first.args = (a, b)
        second.prepend(first)
        second.args = (x, first)
        second.kwargs = {"alpha": 1.001} if wrong else {}
        return found

    monkeypatch.setattr(tracing, "trace", reordered)
    x = example().float()
    if wrong:
        with pytest.raises(TraceError, match="does not compute what the model computes"):
            tracing.traced(Cancelling(), (x,), {})
    else:
        assert not tracing.traced(Cancelling(), (x,), {}).notes


class Branch(nn.Module):
    """Another path in training mode, with no random number."""

    def forward(self, h: Tensor) -> Tensor:
        """h -> h or 2 h"""
        return 2 * h if self.training else h


class Counting(nn.Module):
    """A buffer that follows the steps of training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """h -> h"""
        if self.training:
            self.steps += 1
        return h


class Codebook(nn.Module):
    """Codes that follow the batch, through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 8), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """h -> its code, straight through"""
        code = self.codes[torch.cdist(h, self.codes).argmin(-1)]
        if self.training:
            self.codes.data.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h + (code - h).detach()


@pytest.mark.parametrize("part", [Branch, Counting, Codebook])
def test_training_mode_that_is_another_is_refused(part: type[nn.Module]) -> None:
    model = Around(part())
    doll = convert(model)
    assert any(r.startswith("no training mode") for r in doll.plan.remarks)
    small = mk.slice(doll, doll.sizes[0])
    for it in (doll, small, pickle.loads(pickle.dumps(small))):
        assert not it.training
        with pytest.raises(TraceError, match="no training mode"):
            it.train()
    model.eval()
    for found, expected in zip(gradients_of(doll), gradients_of(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def gradients_of(model: nn.Module) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(example()).square().sum(), wanted))


class Overridden(nn.BatchNorm1d):
    """A batch norm that stays frozen whatever is asked."""

    def train(self, mode: bool = True) -> Overridden:
        """Ignores the mode."""
        return super().train(False)


class Functional(nn.BatchNorm1d):
    """A batch norm that never asks for its mode."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C] -> [N, C]"""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("part", [Overridden, Functional, nn.BatchNorm1d])
def test_a_frozen_batch_norm_stays_frozen(part: type[nn.BatchNorm1d]) -> None:
    model = Around(nn.Sequential(part(8), nn.BatchNorm1d(8))).train()
    model(example())
    if part is nn.BatchNorm1d:
        model.body[0].eval()
    doll = convert(model)
    assert doll.training
    torch.testing.assert_close(doll(example()), model(example()), rtol=1e-12, atol=1e-12)
    before = [b.clone() for b in model.body[0].buffers()]
    doll(example())
    assert all(map(torch.equal, before, model.body[0].buffers()))


def test_dropout_is_no_difference() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    body = nn.Sequential(nn.Dropout(0.5), nn.Unflatten(0, (2, 3)), layer, nn.Flatten(0, 1))
    doll = convert(Around(body))
    assert doll.training and not [r for r in doll.plan.remarks if "mode" in r]


def test_parameters_that_are_tied_or_frozen_are_no_difference() -> None:
    model = Around(torch.tanh)
    model.other = nn.Linear(8, 8).double()
    model.other.weight = nn.Parameter(model.first[2].weight[:, :8].detach().clone())
    model.body = model.other
    model.first[0].requires_grad_(False)
    assert convert(model).training
