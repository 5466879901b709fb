"""The scan against a loop in complex128 and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.fmrlrec.scan import lru_scan, scan_in_parallel, scan_step

SHAPES = [(1, 1, 1), (2, 2, 3), (3, 7, 5), (2, 50, 4), (0, 4, 2)]


def naive(u: Tensor, transition: Tensor) -> Tensor:
    h = torch.zeros(u.shape[0], u.shape[2], dtype=torch.complex128)
    states = []
    for t in range(u.shape[1]):
        h = torch.view_as_complex(transition) * h + torch.view_as_complex(u[:, t].contiguous())
        states.append(h)
    return torch.view_as_real(torch.stack(states, 1))


def example(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    batch, length, states = shape
    u = torch.randn(batch, length, states, 2, dtype=torch.float64, requires_grad=True)
    transition = 0.6 * torch.randn(states, 2, dtype=torch.float64)
    return u, transition.requires_grad_()


@pytest.mark.parametrize("scan", [lru_scan, scan_in_parallel])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_match_a_loop(scan, shape: tuple[int, int, int]) -> None:
    u, transition = example(shape)
    weight = torch.randn(u.shape, dtype=torch.float64)
    expected = naive(u, transition)
    found = scan(u, transition)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad((expected * weight).sum(), (u, transition))
    loss = (found * weight).sum()
    mine = torch.autograd.grad(loss, (u, transition), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(mine, grads)


def test_operator_is_registered_soundly() -> None:
    torch.library.opcheck(lru_scan, example((2, 4, 3)))


def test_inputs_that_are_not_contiguous() -> None:
    u, transition = example((2, 5, 3))
    turned = u.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(lru_scan(turned, transition), naive(u, transition))


def test_half_precision_sums_in_float32() -> None:
    u, transition = (x.detach() for x in example((2, 50, 4)))
    found = lru_scan(u.bfloat16(), transition.float())
    rounded = naive(u.bfloat16().double(), transition.float().double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, rounded.bfloat16())


def test_steps_give_the_scan() -> None:
    u, transition = example((2, 6, 3))
    state = torch.zeros(2, 3, 2, dtype=torch.float64)
    for t in range(6):
        state = scan_step(u[:, t], transition, state)
        torch.testing.assert_close(state, naive(u, transition)[:, t])
