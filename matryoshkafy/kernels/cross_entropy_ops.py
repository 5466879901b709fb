"""The nested cross entropy as an operator: what runs, which shapes come out, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from matryoshkafy.kernels import cross_entropy, norms
from matryoshkafy.kernels.cross_entropy_problem import Gradients, LossOptions, Problem
from matryoshkafy.kernels.dispatch import Context, Grads

if TYPE_CHECKING:
    from typing_extensions import Unpack

# As the schemas have them: widths, weights, ignore_index, smoothing, reduction or scale, needs.
Settings = tuple[list[int], list[float], int, float]
Call = tuple[list[int], list[float], int, float, str, list[bool]]
GradsCall = tuple[list[int], list[float], int, float, Tensor, list[bool]]
Inputs = tuple[
    Tensor, Tensor, Tensor | None, Tensor, list[int], list[float], int, float, str, list[bool]
]


class LossContext(Context, Protocol):
    """What the loss keeps."""

    settings: Settings
    reduction: str
    needs: list[bool]


def _optional(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, empty where not needed: an operator returns tensors only."""
    none = like.new_empty(0)
    hidden, table, bias = grads.hidden, grads.table, grads.bias
    return (
        none if hidden is None else hidden,
        none.clone() if table is None else table,
        none.clone() if bias is None else bias,
    )


def _options_of(settings: Settings) -> LossOptions:
    widths, weights, ignore_index, smoothing = settings
    return LossOptions(tuple(widths), tuple(weights), ignore_index, smoothing)


def nested_cross_entropy(
    hidden: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, *args: Unpack[Call]
) -> tuple[Tensor, ...]:
    *_, reduction, needs = args
    options, problem = _options_of(args[:4]), Problem(hidden, table, bias, target)
    scale = cross_entropy.row_scale(target, options.ignore_index, mean=reduction == "mean")
    losses, grads = cross_entropy.evaluate(problem, options, scale=scale, needs=tuple(needs))
    total = cross_entropy.weighted(losses, options)
    total = total if reduction == "none" else total.sum() * scale
    return total, losses, *_optional(grads, hidden)


def nested_cross_entropy_shape(
    hidden: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, *args: Unpack[Call]
) -> tuple[Tensor, ...]:
    widths, _, _, _, reduction, needs = args
    dtype = norms.accumulation_dtype(hidden.dtype)
    total = hidden.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    losses = hidden.new_empty(len(widths), target.shape[0], dtype=dtype)
    return total, losses, *grads_shape(hidden, table, bias, needs)


def grads_shape(
    hidden: Tensor, table: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t) if need and t is not None else hidden.new_empty(0)
        for t, need in zip((hidden, table, bias), needs, strict=True)
    )


def nested_cross_entropy_setup(
    ctx: LossContext, inputs: Inputs, output: tuple[Tensor, ...]
) -> None:
    hidden, table, bias, target = inputs[:4]
    ctx.settings, ctx.reduction, ctx.needs = inputs[4:8], inputs[8], inputs[9]
    ctx.mark_non_differentiable(*output[1:])
    later = (hidden, table, bias, target) if ctx.reduction == "none" else output[2:]
    ctx.save_for_backward(*later)


def nested_cross_entropy_backward(ctx: LossContext, slope: Tensor, *_: Tensor) -> Grads:
    grads, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    if ctx.reduction == "none":
        op = torch.ops.matryoshkafy.nested_cross_entropy_grads
        grads = op(*grads, *ctx.settings, slope, list(needs))
    else:
        grads = [grad * slope.to(grad.dtype) for grad in grads]
    shown = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *shown, None, None, None, None, None, None, None


def nested_cross_entropy_grads(
    hidden: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, *args: Unpack[GradsCall]
) -> tuple[Tensor, ...]:
    *_, scale, needs = args
    problem, options = Problem(hidden, table, bias, target), _options_of(args[:4])
    _, grads = cross_entropy.evaluate(problem, options, scale=scale, needs=tuple(needs))
    return _optional(grads, hidden)


def nested_cross_entropy_grads_shape(
    hidden: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, *args: Unpack[GradsCall]
) -> tuple[Tensor, ...]:
    return grads_shape(hidden, table, bias, args[-1])
