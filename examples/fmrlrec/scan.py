"""The diagonal complex recurrence h_t = lambda h_{t-1} + u_t as one operator on real tensors.

(re, im) is the last dimension of size 2, so the states are one axis and nothing else is complex.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("fmrlrec::lru_scan", mutates_args=())
def lru_scan(u: Tensor, transition: Tensor) -> Tensor:
    """Returns every state of the recurrence, from a zero state before the first step.

    u [B, T, N, 2], transition [N, 2] -> [B, T, N, 2] in the dtype of u; half precision is summed in
    float32.
    """
    states = _working(u, transition).clone(memory_format=torch.contiguous_format)
    _accumulate(torch.view_as_complex(states), _as_complex(transition, states))
    return states.to(u.dtype)


@lru_scan.register_fake
def _lru_scan_shape(u: Tensor, transition: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("fmrlrec::lru_scan_backward", mutates_args=())
def lru_scan_backward(
    grad: Tensor, states: Tensor, transition: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of u and of the transition in closed form.

    G_t = g_t + conj(lambda) G_{t+1} is the gradient of u_t, and sum_t G_t conj(h_{t-1}) that of
    lambda: two scans instead of a graph of T steps.
    """
    flowing = _working(grad, transition).clone(memory_format=torch.contiguous_format)
    backwards = torch.view_as_complex(flowing)
    _accumulate_reversed(backwards, _as_complex(transition, flowing).conj_physical())
    earlier = _as_complex(states, flowing)[:, :-1]
    moved = torch.view_as_real((backwards[:, 1:] * earlier.conj()).sum((0, 1)))
    return flowing.to(grad.dtype), moved.to(transition.dtype)


@lru_scan_backward.register_fake
def _lru_scan_backward_shape(
    grad: Tensor, states: Tensor, transition: Tensor
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(grad, memory_format=contiguous), torch.empty_like(transition)


def _remember(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(output, inputs[1])


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, Tensor]:
    states, transition = ctx.saved_tensors  # type: ignore[attr-defined]
    return lru_scan_backward(grad, states, transition)


lru_scan.register_autograd(_differentiate, setup_context=_remember)


def scan_in_parallel(u: Tensor, transition: Tensor) -> Tensor:
    """The same recurrence by doubling: log2(T) steps, each over all positions at once.

    Differentiable plain torch; the reference that the operator is tested against.
    """
    states, power = torch.view_as_complex(u.contiguous()), torch.view_as_complex(transition)
    reach = 1
    while reach < u.shape[1]:
        carried = states[:, :-reach] * power
        states = torch.cat((states[:, :reach], states[:, reach:] + carried), dim=1)
        power, reach = power * power, 2 * reach
    return torch.view_as_real(states)


def scan_step(u: Tensor, transition: Tensor, state: Tensor) -> Tensor:
    """One step of the recurrence: u [B, N, 2] and state [B, N, 2] -> the next state."""
    re, im = transition.unbind(-1)
    before_re, before_im = state.unbind(-1)
    moved = (re * before_re - im * before_im, re * before_im + im * before_re)
    return u + torch.stack(moved, dim=-1)


def _working(value: Tensor, transition: Tensor) -> Tensor:
    dtype = torch.promote_types(value.dtype, transition.dtype)
    return value.to(torch.promote_types(dtype, torch.float32))


def _as_complex(value: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(value.to(like.dtype).contiguous())


def _accumulate(states: Tensor, transition: Tensor) -> None:
    for before, after in zip(range(states.shape[1]), range(1, states.shape[1]), strict=False):
        states[:, after].addcmul_(states[:, before], transition)


def _accumulate_reversed(grads: Tensor, transition: Tensor) -> None:
    for after in range(grads.shape[1] - 1, 0, -1):
        grads[:, after - 1].addcmul_(grads[:, after], transition)
