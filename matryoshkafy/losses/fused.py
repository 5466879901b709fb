"""nested_cross_entropy: the cross entropies of all sizes in one pass over the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import matryoshkafy.kernels.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels import cross_entropy_grads
from matryoshkafy.kernels.cross_entropy_problem import LossOptions, Problem
from matryoshkafy.kernels.dispatch import is_plain

REDUCTIONS = ("mean", "sum", "none")


class LossError(MatryoshkafyError):
    """A loss was given sizes, weights or tensors that do not fit."""


def nested_cross_entropy(  # noqa: PLR0913 - one option per line of the formula
    hidden: Tensor,
    table: Tensor,
    target: Tensor,
    sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_per_size: bool = False,
    scales: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds up the cross entropies of hidden[..., :m] @ table[:, :m].T + bias over the sizes m.

    Gradients are computed in the forward; there is no double backward. Under autocast the products
    run in its dtype and the sums in float32.

    Args:
        hidden: [..., D].
        table: [V, D], a row per class.
        target: [...], indices of classes.
        sizes: in any order.
        weights: of the sizes, in the same order; 1 by default.
        bias: [V].
        ignore_index: targets that are left out.
        label_smoothing: as in torch.
        reduction: "mean" over the targets that are not ignore_index, and nan if there are none, as
            in torch; "sum"; "none" gives [...].
        return_per_size: also return the unweighted loss of each size, detached: [len(sizes)], or
            [len(sizes), ...] for "none".
        scales: [len(sizes)], positive, in the order of the sizes: they multiply the scores of each,
            bias included, and receive gradients.

    Raises:
        LossError: shapes, sizes or words that do not fit.
    """
    if reduction not in REDUCTIONS:
        raise LossError(f"nested_cross_entropy: reduction {reduction!r} is not of {REDUCTIONS}")
    _check(hidden, table, target, sizes, weights=weights, scales=scales)
    flat = target.reshape(-1)
    hidden, table = _autocast(hidden.reshape(-1, hidden.shape[-1])), _autocast(table)
    ordered = options_of(sizes, weights, ignore_index, label_smoothing)
    ranks = [ordered.widths.index(size) for size in sizes]
    if scales is not None:
        # Not indexed by a list, which would be copied to the device.
        order = sorted(range(len(sizes)), key=ranks.__getitem__)
        scales = torch.stack([scales[i] for i in order])
    problem = Problem(hidden, table, None if bias is None else bias.to(table.dtype), flat)
    total, losses = _run(problem, ordered, reduction, scales)
    total = total.view(target.shape) if reduction == "none" else total
    if not return_per_size:
        return total
    ordered_losses = torch.stack([losses[rank] for rank in ranks])
    return total, _reduced(ordered_losses, flat != ignore_index, target.shape, reduction)


def _check(
    hidden: Tensor,
    table: Tensor,
    target: Tensor,
    sizes: Sequence[int],
    *,
    weights: Sequence[float] | None,
    scales: Tensor | None,
) -> None:
    """Raises LossError with what was given and what was expected."""
    width = hidden.shape[-1]
    rows = (
        (table.shape[1:] == (width,), f"table {list(table.shape)} should be [V, {width}]"),
        (
            target.shape == hidden.shape[:-1] and not target.is_floating_point(),
            f"target {list(target.shape)} {target.dtype} should be class indices "
            f"{list(hidden.shape[:-1])}; give probabilities to torch's cross_entropy, size by size",
        ),
        (
            len(set(sizes)) == len(sizes) > 0 and min(sizes) > 0 and max(sizes) <= width,
            f"sizes {list(sizes)} should be distinct and within 1..{width}",
        ),
        (
            weights is None or len(weights) == len(sizes),
            f"weights {weights} should be one per size of {list(sizes)}",
        ),
        (
            scales is None or scales.shape == (len(sizes),),
            f"scales {None if scales is None else list(scales.shape)} should be [{len(sizes)}]",
        ),
    )
    for holds, message in rows:
        if not holds:
            raise LossError(f"nested_cross_entropy: {message}")


def options_of(
    sizes: Sequence[int], weights: Sequence[float] | None, ignore_index: int, smoothing: float
) -> LossOptions:
    """The sizes ascending, each with its weight."""
    pairs = sorted(zip(sizes, weights or [1.0] * len(sizes), strict=True))
    widths, ordered = zip(*pairs, strict=True)
    return LossOptions(tuple(widths), tuple(float(w) for w in ordered), ignore_index, smoothing)


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast would give a matmul's operand."""
    device = x.device.type
    # Devices without autocast, such as meta, do not answer whether it is enabled.
    if not torch.amp.is_autocast_available(device) or x.dtype == torch.float64:
        return x
    if not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _run(
    problem: Problem, options: LossOptions, reduction: str, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The total and the losses [sizes, N]: directly in eager mode, one operator while tracing."""
    # One size alone: its scale is cheaper on the hidden values than on the scores.
    fold = scales is not None and len(scales) == 1
    if is_plain(problem.hidden) and not fold:
        if scales is not None:
            own = scales.detach()
            values = own.unbind() if own.is_cuda else tuple(float(s) for s in own)
            options = replace(options, scales=values)
        return cross_entropy_grads.apply(problem, options, reduction=reduction, scales=scales)
    if scales is not None:
        return size_by_size(problem, options, reduction, scales)
    tensors = (problem.hidden, problem.table, problem.bias)
    grad = torch.is_grad_enabled() and reduction != "none"
    needs = [grad and t is not None and t.requires_grad for t in tensors]
    settings = (options.widths, options.weights, options.ignore_index, options.smoothing)
    op = torch.ops.matryoshkafy.nested_cross_entropy
    return op(*tensors, problem.target, *settings, reduction, needs)[:2]


def size_by_size(
    problem: Problem, options: LossOptions, reduction: str, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, scales multiplied into the hidden values: one operator per size."""
    totals: list[Tensor] = []
    losses: list[Tensor] = []
    for width, weight, scale in zip(options.widths, options.weights, scales, strict=True):
        bias = None if problem.bias is None else problem.bias * scale
        one = replace(problem, hidden=problem.hidden * scale, bias=bias)
        total, loss = _run(one, replace(options, widths=(width,), weights=(1.0,)), reduction, None)
        totals.append(weight * total)
        losses.append(loss)
    return torch.stack(totals).sum(0), torch.cat(losses)


def _reduced(losses: Tensor, real: Tensor, shape: Sequence[int], reduction: str) -> Tensor:
    """Losses [sizes, N] reduced over the real rows."""
    if reduction == "none":
        return losses.view(-1, *shape)
    total = losses.sum(1)
    return total / real.sum() if reduction == "mean" else total
