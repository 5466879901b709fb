"""Softmax over the target and a given set of negatives, for tables of millions of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshkafy.losses.fused import LossError, options_of
from matryoshkafy.outputs import running


def nested_sampled_softmax(  # noqa: PLR0913 - one option per line of the formula
    hidden: Tensor,
    table: Tensor,
    target: Tensor,
    negatives: Tensor,
    sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    bias: Tensor | None = None,
    log_q: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_per_size: bool = False,
    sparse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds up, over the sizes, the cross entropy of the target against the negatives alone.

    A negative that equals the target is left out.

    Args:
        hidden: [..., D].
        table: [V, D], a row per class.
        target: [...], indices of classes.
        negatives: [K] shared by all rows, or [..., K].
        sizes: in any order.
        weights: of the sizes, in the same order; 1 by default.
        bias: [V].
        log_q: [V], the log-probability with which a class is drawn: it is subtracted from its logit
            (Bengio and Senecal 2008).
        ignore_index: targets that are left out.
        reduction: "mean" or "sum" over real rows.
        return_per_size: also return the unweighted loss of each size, detached.
        sparse: give the table a sparse gradient.

    Raises:
        LossError: shapes, sizes or words that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise LossError(f"nested_sampled_softmax: reduction {reduction!r} is not 'mean' or 'sum'")
    real = torch.nonzero(target.reshape(-1) != ignore_index).squeeze(1)
    x = hidden.reshape(-1, hidden.shape[-1])[real]
    positive = target.reshape(-1)[real]
    shared = negatives.ndim == 1
    others = negatives if shared else negatives.reshape(-1, negatives.shape[-1])[real]
    candidates = Candidates(table, bias, log_q, sparse=sparse)
    options = options_of(sizes, weights, ignore_index, 0.0)
    rows = (candidates.rows(positive), candidates.rows(others))
    offsets = (candidates.offset(positive), candidates.offset(others))
    hit = others == positive[:, None]
    losses = nested_losses(x, rows, offsets, hit, options.widths)
    divisor = len(real) if reduction == "mean" else 1
    per_size = losses / divisor if divisor else losses * float("nan")
    total = (per_size * per_size.new_tensor(options.weights)).sum()
    ranks = [options.widths.index(size) for size in sizes]
    return (total, per_size.detach()[ranks]) if return_per_size else total


class Candidates:
    """Rows of the table by class, and what is added to their logits."""

    def __init__(
        self, table: Tensor, bias: Tensor | None, log_q: Tensor | None, *, sparse: bool
    ) -> None:
        self.table, self.bias, self.log_q, self.sparse = table, bias, log_q, sparse

    def rows(self, classes: Tensor) -> Tensor:
        """[..., D]."""
        return F.embedding(classes, self.table, sparse=self.sparse)

    def offset(self, classes: Tensor) -> Tensor:
        """[...]: the bias minus the log-probability of being drawn."""
        zero = self.table.new_zeros(classes.shape)
        added = zero if self.bias is None else self.bias[classes]
        return added if self.log_q is None else added - self.log_q[classes].to(added)


def nested_losses(
    x: Tensor,
    rows: tuple[Tensor, Tensor],
    offsets: tuple[Tensor, Tensor],
    hit: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """The summed loss of each size, from running logits of positive [N] and negatives [N, K]."""
    (good, bad), (own, others) = rows, offsets
    others = others.expand(hit.shape).masked_fill(hit, -torch.inf)
    positives = running(x, good[:, None], widths, own[:, None])
    losses: list[Tensor] = []
    for own, scores in zip(positives, running(x, bad, widths, others), strict=True):
        norm = torch.logaddexp(own[:, 0], scores.logsumexp(1)) if hit.shape[1] else own[:, 0]
        losses.append((norm - own[:, 0]).sum())
    return torch.stack(losses)
