"""apply(): the nested cross entropy with its gradients, as autograd functions."""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from matryoshkafy.kernels.cross_entropy import evaluate, row_scale, weighted
from matryoshkafy.kernels.cross_entropy_problem import LossOptions, Problem
from matryoshkafy.kernels.dispatch import Context, DoubleBackward, Grads


class RowContext(Context, Protocol):
    """What the loss of each row keeps."""

    options: LossOptions


class NestedCrossEntropy(torch.autograd.Function):
    """The sum (or the mean over real rows) of the weighted losses, and the losses [sizes, N].

    The losses carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Context, problem: Problem, options: LossOptions, mean: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scale = row_scale(problem.target, options.ignore_index, mean=mean)
        needs = ctx.needs_input_grad[3:]
        losses, grads = evaluate(problem, options, scale=scale, needs=needs)
        ctx.save_for_backward(grads.hidden, grads.table, grads.bias, grads.scales)
        ctx.mark_non_differentiable(losses)
        return weighted(losses, options).sum() * scale, losses

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> Grads:
        if torch.is_grad_enabled():
            raise DoubleBackward("nested_cross_entropy")
        spend = not keeps_graph()
        grads = [times(grad, slopes[0], spend=spend) for grad in ctx.saved_tensors]
        return None, None, None, *grads


def keeps_graph() -> bool:
    """Whether the running backward may be followed by another over the same graph."""
    autograd = getattr(torch._C, "_autograd", None)
    ask = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def times(grad: Tensor | None, slope: Tensor, *, spend: bool) -> Tensor | None:
    """grad * slope, in place where no later backward needs the stored gradient."""
    if grad is None:
        return None
    slope = slope.to(grad.dtype)
    return grad.mul_(slope) if spend else grad * slope


class RowCrossEntropy(torch.autograd.Function):
    """The weighted loss of each row [N], and the losses [sizes, N], which carry no gradient."""

    @staticmethod
    def forward(
        ctx: RowContext, problem: Problem, options: LossOptions, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        losses, _ = evaluate(problem, options)
        ctx.options = options
        ctx.save_for_backward(problem.target, *tensors)
        ctx.mark_non_differentiable(losses)
        return weighted(losses, options), losses

    @staticmethod
    def backward(ctx: RowContext, *slopes: Tensor) -> Grads:
        if torch.is_grad_enabled():
            raise DoubleBackward("nested_cross_entropy")
        target, hidden, table, bias, _ = ctx.saved_tensors
        problem = Problem(hidden, table, bias, target)
        needs = ctx.needs_input_grad[2:]
        _, grads = evaluate(problem, ctx.options, scale=slopes[0], needs=needs)
        return None, None, grads.hidden, grads.table, grads.bias, grads.scales


def apply(
    problem: Problem, options: LossOptions, *, reduction: str, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reduced weighted loss and the losses [sizes, N], for eager mode.

    scales [sizes], in the order of the widths, are those of the options.
    """
    tensors = (problem.hidden, problem.table, problem.bias, scales)
    if not torch.is_grad_enabled():
        # needs_input_grad does not look at the grad mode
        tensors = tuple(None if t is None else t.detach() for t in tensors)
    if reduction == "none":
        return RowCrossEntropy.apply(problem, options, *tensors)
    return NestedCrossEntropy.apply(problem, options, reduction == "mean", *tensors)
