"""The scan against a loop in complex128 and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.fmrlrec.scan import _doubled, lru_scan, scan_step

SHAPES = [(1, 1, 1), (2, 2, 3), (3, 7, 5), (2, 50, 4), (0, 4, 2)]


def naive(u: Tensor, transition: Tensor, real: Tensor) -> Tensor:
    h = torch.zeros(u.shape[0], u.shape[2], dtype=torch.complex128)
    states = []
    for t in range(u.shape[1]):
        h = torch.view_as_complex(transition) * h + torch.view_as_complex(u[:, t].contiguous())
        h = h * real[:, t, None]
        states.append(h)
    return torch.view_as_real(torch.stack(states, 1))


def in_parallel(u: Tensor, transition: Tensor, real: Tensor) -> Tensor:
    """The same recurrence by doubling: log2(T) steps of plain torch, each over all positions."""
    open_gate = real[:, :, None].to(u.dtype)
    states = torch.view_as_complex(u.contiguous()) * open_gate
    factors = torch.view_as_complex(transition) * open_gate
    reach = 1
    while reach < u.shape[1]:
        states, factors = (
            torch.cat((x[:, :reach], later), dim=1)
            for x, later in (
                (states, states[:, reach:] + factors[:, reach:] * states[:, :-reach]),
                (factors, factors[:, reach:] * factors[:, :-reach]),
            )
        )
        reach *= 2
    return torch.view_as_real(states)


def example(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    batch, length, states = shape
    u = torch.randn(batch, length, states, 2, dtype=torch.float64, requires_grad=True)
    transition = 0.6 * torch.randn(states, 2, dtype=torch.float64)
    return u, transition.requires_grad_(), torch.rand(batch, length) < 0.8


@pytest.mark.parametrize("scan", [lru_scan, in_parallel])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_match_a_loop(scan, shape: tuple[int, int, int]) -> None:
    u, transition, real = example(shape)
    weight = torch.randn(u.shape, dtype=torch.float64)
    expected, found = naive(u, transition, real), scan(u, transition, real)
    torch.testing.assert_close(found, expected)
    expected_grads, grads = (
        torch.autograd.grad(
            (value * weight).sum(), (u, transition), allow_unused=True, materialize_grads=True
        )
        for value in (expected, found)
    )
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("shape", SHAPES)
def test_doubling_as_a_gpu_does_it_matches_a_loop(shape: tuple[int, int, int]) -> None:
    u, transition, real = example(shape)
    u, transition = u.detach(), transition.detach()
    states = torch.view_as_complex(u * real[:, :, None, None])
    found = _doubled(states, torch.view_as_complex(transition), real)
    torch.testing.assert_close(torch.view_as_real(found), naive(u, transition, real))


def test_operator_is_registered_soundly() -> None:
    torch.library.opcheck(lru_scan, example((2, 4, 3)))


def test_inputs_that_are_not_contiguous() -> None:
    u, transition, real = example((2, 5, 3))
    turned = u.detach().transpose(0, 1).contiguous().transpose(0, 1)
    found = lru_scan(turned, transition, real.t().contiguous().t())
    torch.testing.assert_close(found, naive(u, transition, real))


def test_half_precision_sums_in_float32() -> None:
    u, transition, real = (x.detach() for x in example((2, 50, 4)))
    found = lru_scan(u.bfloat16(), transition.float(), real)
    rounded = naive(u.bfloat16().double(), transition.float().double(), real)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, rounded.bfloat16())


def test_steps_give_the_scan() -> None:
    u, transition, real = example((2, 6, 3))
    state = torch.zeros(2, 3, 2, dtype=torch.float64)
    for t in range(6):
        state = scan_step(u[:, t], transition, real[:, t], state)
        torch.testing.assert_close(state, naive(u, transition, real)[:, t])


def test_a_gap_separates_two_sequences() -> None:
    u, transition, _ = example((1, 7, 3))
    real = torch.tensor([[True] * 3 + [False] + [True] * 3])
    found = lru_scan(u, transition, real)
    alone = lru_scan(u[:, 4:], transition, real[:, 4:])
    torch.testing.assert_close(found[:, 4:], alone)
