"""The diagonal complex recurrence h_t = lambda h_{t-1} + u_t as one operator on real tensors.

(re, im) is the last dimension of size 2, so the states are one axis and nothing else is complex.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("fmrlrec::lru_scan", mutates_args=())
def lru_scan(u: Tensor, transition: Tensor, real: Tensor) -> Tensor:
    """Returns every state h_t = real_t (lambda h_{t-1} + u_t), from a zero state on.

    u [B, T, N, 2], transition [N, 2], real bool [B, T] -> [B, T, N, 2] in the dtype of u; half
    precision is summed in float32. A position that is not real has a zero state, which nothing
    after it sees beyond: it separates sequences that share a row.
    """
    states = _working(u, transition) * real[:, :, None, None]
    _carry(torch.view_as_complex(states), _as_complex(transition, states), real)
    return states.to(u.dtype)


@torch.library.custom_op("fmrlrec::lru_scan_backward", mutates_args=())
def lru_scan_backward(
    grad: Tensor, states: Tensor, transition: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of u and of the transition in closed form.

    G_t = real_t (g_t + conj(lambda) G_{t+1}) is the gradient of u_t, and sum_t G_t conj(h_{t-1})
    that of lambda: two scans instead of a graph of T steps.
    """
    flowing = _working(grad, transition) * real[:, :, None, None]
    backwards = torch.view_as_complex(flowing)
    turned = _as_complex(transition, flowing).conj_physical()
    _carry(backwards, turned, real, backwards=True)
    earlier = _as_complex(states, flowing)[:, :-1]
    moved = torch.view_as_real((backwards[:, 1:] * earlier.conj()).sum((0, 1)))
    return flowing.to(grad.dtype), moved.to(transition.dtype)


lru_scan.register_fake(lambda u, transition, real: u.new_empty(u.shape))
lru_scan_backward.register_fake(
    lambda grad, states, transition, real: (
        grad.new_empty(grad.shape),
        torch.empty_like(transition),
    )
)
lru_scan.register_autograd(
    lambda ctx, grad: (*lru_scan_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs[1:]),
)


def scan_step(u: Tensor, transition: Tensor, real: Tensor, state: Tensor) -> Tensor:
    """One step: u [B, N, 2], real bool [B] and state [B, N, 2] -> the next state."""
    re, im = transition.unbind(-1)
    before_re, before_im = state.unbind(-1)
    moved = (re * before_re - im * before_im, re * before_im + im * before_re)
    return (u + torch.stack(moved, dim=-1)) * real[:, None, None]


def _working(value: Tensor, transition: Tensor) -> Tensor:
    dtype = torch.promote_types(value.dtype, transition.dtype)
    return value.to(torch.promote_types(dtype, torch.float32))


def _as_complex(value: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(value.to(like.dtype).contiguous())


def _carry(states: Tensor, transition: Tensor, real: Tensor, *, backwards: bool = False) -> None:
    """Adds to each state, in place, what the one before it (backwards: after it) brings to it."""
    order = range(states.shape[1])[:: -1 if backwards else 1]
    real = real.flip(1) if backwards else real
    if states.is_cuda:
        found = _doubled(states.flip(1) if backwards else states, transition, real)
        states.copy_(found.flip(1) if backwards else found)
        return
    # The steps at which a state that is not zero would be carried into padding.
    cuts = (real[:, :-1] & ~real[:, 1:]).any(0).tolist()
    for place, cut in enumerate(cuts, start=1):
        state = states[:, order[place]]
        state.addcmul_(states[:, order[place - 1]], transition)
        if cut:
            state.mul_(real[:, place, None])


def _doubled(states: Tensor, transition: Tensor, real: Tensor) -> Tensor:
    """The same in log2(T) passes over all steps, which a GPU prefers to T small ones.

    After a pass over `reach` steps each state has what 2 * reach steps carry to it; `whole` tells
    where no padding lies between.
    """
    whole, reach = real.clone(), 1
    while reach < states.shape[1]:
        moved = states[:, :-reach] * (transition * whole[:, reach:, None])
        states = torch.cat((states[:, :reach], states[:, reach:] + moved), dim=1)
        joined = whole[:, reach:] & whole[:, :-reach]
        whole = torch.cat((torch.zeros_like(whole[:, :reach]), joined), dim=1)
        transition, reach = transition * transition, 2 * reach
    return states
