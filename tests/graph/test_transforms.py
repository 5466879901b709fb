"""Forwards that differentiate or map themselves: the doll computes what they do, at any values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.graph.trace import trace


class Energy(nn.Module):
    """A scalar of a point, through two layers of a width."""

    def __init__(self, width: int, answer: Callable[[Energy, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, width)
        self.last, self.answer = nn.Linear(width, 1), answer

    def energy(self, x: Tensor) -> Tensor:
        """x [.., 6] -> [..]"""
        inner = nn.functional.softplus(self.second(torch.tanh(self.first(x))))
        return self.last(inner).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 6] -> forces [N, 6]"""
        return self.answer(self, x)


def by_autograd(model: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.clone().requires_grad_()
        return -torch.autograd.grad(model.energy(x).sum(), x, create_graph=True)[0]


def by_func(model: Energy, x: Tensor) -> Tensor:
    return -vmap(grad(model.energy))(x)


def by_jacobian(model: Energy, x: Tensor) -> Tensor:
    return -vmap(jacrev(model.energy))(x)


def by_tangent(model: Energy, x: Tensor) -> Tensor:
    return jvp(model.energy, (x,), (torch.cos(x),))[1]


@pytest.mark.parametrize("answer", [by_autograd, by_func, by_jacobian, by_tangent])
@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_a_derivative_is_that_of_the_input_at_hand(
    answer: Callable[[Energy, Tensor], Tensor], nesting: str
) -> None:
    torch.manual_seed(0)
    model = Energy(16, answer).double()
    doll = mk.convert(model, torch.randn(4, 6).double(), sizes=[8, 16], nesting=nesting)
    other = torch.randn(4, 6).double()
    small = Energy(8, answer).double()
    # A derivative reads no last bias; a sub-model holds what it reads.
    small.load_state_dict(mk.slice(doll, 8).state_dict(), strict=False)
    if nesting == "sliced":
        torch.testing.assert_close(doll(other), model(other), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mk.slice(doll, 8)(other), small(other), rtol=1e-12, atol=1e-12)


def test_an_ensemble_that_is_mapped_nests() -> None:
    class Ensemble(nn.Module):
        """Three critics in one call; the least of their values."""

        def __init__(self) -> None:
            super().__init__()
            made = [nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(3)]
            stacked, _ = stack_module_state(made)
            self.names = list(stacked)
            self.stacked = nn.ParameterList(nn.Parameter(t.detach()) for t in stacked.values())
            self.base = [made[0].to("meta")]

        def forward(self, x: Tensor) -> Tensor:
            """x [N, 5] -> [N, 1]"""
            state = dict(zip(self.names, self.stacked, strict=True))
            return vmap(lambda s: functional_call(self.base[0], s, (x,)))(state).amin(0)

    torch.manual_seed(0)
    model = Ensemble()
    doll = mk.convert(model, torch.randn(4, 5), sizes=[8, 16], nesting="sliced")
    x = torch.randn(4, 5)
    torch.testing.assert_close(doll(x), model(x))
    assert mk.slice(doll, 8).state_dict()["stacked.0"].shape == (3, 8, 5)


class Asking(nn.Module):
    """Asks whether a value of its own has a gradient, in one of the ways there are."""

    def __init__(self, asks: Callable[[Tensor], bool], *, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        self.asks = asks
        self.first.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 6] -> [N, 3]"""
        h = self.first(x)
        return self.last(h * 2 if self.asks(h) else h.tanh())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "asks",
    [
        lambda h: h.requires_grad,
        lambda h: h.grad_fn is not None,
        lambda h: not h.is_leaf,
    ],
    ids=["requires_grad", "grad_fn", "is_leaf"],
)
def test_a_forward_that_asks_for_gradients_is_traced_as_it_is_called(
    asks: Callable[[Tensor], bool], frozen: bool
) -> None:
    """The trace is made without gradients unless somebody asks."""
    model, x = Asking(asks, frozen=frozen), torch.randn(4, 6, dtype=torch.float64)
    found = trace(model, (x,))
    computed = torch.fx.Interpreter(found.root, graph=found.graph).run(x)[0]
    assert torch.equal(computed, model(x))
    assert [p.requires_grad for p in model.parameters()] == [not frozen] * 2 + [True] * 2


def caught(asks: Callable[[Tensor], bool]) -> Callable[[Tensor], bool]:
    """A forward that takes any failure for a no."""

    def safely(h: Tensor) -> bool:
        try:
            return asks(h)
        except Exception:  # noqa: BLE001  as careless code does
            return False

    return safely


def test_a_forward_that_catches_everything_is_traced_as_it_is_called() -> None:
    model = Asking(caught(lambda h: h.requires_grad), frozen=False)
    x = torch.randn(4, 6, dtype=torch.float64)
    found = trace(model, (x,))
    assert torch.equal(torch.fx.Interpreter(found.root, graph=found.graph).run(x)[0], model(x))


def test_a_derivative_whose_failure_is_caught_is_recorded() -> None:
    def careful(model: Energy, x: Tensor) -> Tensor:
        try:
            return by_autograd(model, x)
        except Exception:  # noqa: BLE001  as careless code does
            return torch.zeros_like(x)

    model, x = Energy(8, careful).double(), torch.randn(3, 6, dtype=torch.float64)
    found = trace(model, (x,))
    other = torch.randn(3, 6, dtype=torch.float64)
    computed = torch.fx.Interpreter(found.root, graph=found.graph).run(other)[0]
    torch.testing.assert_close(computed, model(other).detach(), rtol=1e-12, atol=1e-12)


class Sealed(nn.Linear):
    """A linear that cannot be copied, so that a spare shares it."""

    def __deepcopy__(self, memo: object) -> Sealed:
        raise TypeError("one of a kind")


def test_a_part_that_a_spare_shares_keeps_its_gradients() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.last = [Sealed(6, 8)], nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.parts[0](x))

    model = Holder()
    with contextlib.suppress(MatryoshkafyError):
        trace(model, (torch.randn(4, 6),))
    shared = model.parts[0]
    assert shared.weight.requires_grad and shared.bias.requires_grad


def a_derivative(x: Tensor, out: Tensor) -> Tensor:
    """The derivative of a sum with gradients of its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return out + torch.autograd.grad((x**3).sum(), x)[0]


def a_read(x: Tensor, out: Tensor) -> Tensor:
    """Another path where the output has a gradient."""
    return out * 3 if out.requires_grad else out


@pytest.mark.parametrize("answer", [a_derivative, a_read])
def test_a_hook_of_the_model_itself_is_watched(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = nn.Linear(6, 6).double(), torch.randn(4, 6, dtype=torch.float64)
    model.register_forward_hook(lambda module, args, out: answer(args[0], out))
    found = trace(model, (x,))
    other = torch.randn(4, 6, dtype=torch.float64)
    computed = torch.fx.Interpreter(found.root, graph=found.graph).run(other)[0]
    torch.testing.assert_close(computed, model(other).detach(), rtol=1e-12, atol=1e-12)
