"""Softmax over the target and some negatives, for tables of millions of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshkafy.losses.fused import LossError, options_of
from matryoshkafy.losses.matryoshka import (
    MatryoshkaLoss,
    Targets,
    Weights,
    by_readout,
    settings_of,
    weighed,
)
from matryoshkafy.outputs import Readout, running


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
    asked = asked_of(hidden, target, negatives, ignore_index)
    options = options_of(sizes, weights, ignore_index, 0.0)
    losses = nested_losses(asked, Candidates(table, bias, log_q, sparse=sparse), options.widths)
    per_size = averaged(losses, asked) if reduction == "mean" else losses
    total = (per_size * per_size.new_tensor(options.weights)).sum()
    ranks = [options.widths.index(size) for size in sizes]
    return (total, per_size.detach()[ranks]) if return_per_size else total


class SampledMatryoshkaLoss(MatryoshkaLoss):
    """MatryoshkaLoss of a cross entropy in which drawn classes stand for all others.

    At each call the target is scored against the same `negatives` for all rows and sizes: each
    class is drawn with the same chance, `ignore_index` never. `per_size` draws, too.

    Args:
        criterion: nn.CrossEntropyLoss without label smoothing or weights of classes, its reduction
            "mean" or "sum".
        negatives: how many are drawn; 0 scores all classes, as MatryoshkaLoss does.
        sizes: as those of MatryoshkaLoss, like all that follows.
        weights: of the sizes.
        learn_scales: a learned scale of each size's scores.
        generator: draws, on the CPU; by default the global one: give all processes the same seed.

    Raises:
        LossError: a criterion or outputs for which classes cannot be drawn.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        negatives: int,
        sizes: Sequence[int] | None = None,
        weights: Weights | None = None,
        *,
        learn_scales: bool | Weights = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(criterion, sizes, weights, learn_scales=learn_scales, generator=generator)
        settings = settings_of(criterion)
        plain = settings is not None and settings.weight is None and not settings.label_smoothing
        if settings is None or not plain or settings.reduction == "none":
            raise LossError(
                f"SampledMatryoshkaLoss: {criterion} should be nn.CrossEntropyLoss without label "
                "smoothing or weights of classes, its reduction 'mean' or 'sum'; any other "
                "criterion goes into MatryoshkaLoss"
            )
        if negatives < 0:
            raise LossError(f"SampledMatryoshkaLoss: negatives {negatives} should be 0 or more")
        self.negatives, self.settings = negatives, settings

    def criteria(
        self, outputs: Mapping[int, object], targets: Targets, weights: dict[int, float]
    ) -> tuple[Tensor, dict[int, Tensor], Mapping[int, object] | None]:
        """The weighted sum, and the loss of each size, detached; nobody keeps the scores."""
        if not self.negatives:
            return super().criteria(outputs, targets, weights)
        readouts, target = self.readouts(outputs, targets, weights), targets[0]
        if not readouts or not isinstance(target, Tensor):
            raise LossError(
                "SampledMatryoshkaLoss wants what `doll.outputs` returned, of a model that ends in "
                "one linear, and one class index a row as the target; give others to MatryoshkaLoss"
            )
        classes = len(next(iter(readouts.values())).table)
        losses = self.sampled(readouts, target, self.others(classes).to(target.device))
        return *weighed({size: losses[size] for size in weights}, weights), None

    def others(self, classes: int) -> Tensor:
        """Classes drawn among so many, [negatives]."""
        never = self.settings.ignore_index
        left_out = 0 <= never < classes
        drawn = torch.randint(
            classes - left_out, (self.negatives,), generator=self.generator, device="cpu"
        )
        return drawn + (drawn >= never) if left_out else drawn

    def sampled(
        self, readouts: Mapping[int, Readout], target: Tensor, others: Tensor
    ) -> dict[int, Tensor]:
        """{size: its loss against others [K]}; sizes of one readout in one pass."""
        scales, losses = self.scales(), dict[int, Tensor]()
        for readout, sizes in by_readout(readouts):
            mine = sorted(sizes, key=readout.widths.__getitem__)
            asked = asked_of(readout.scaled, target, others, self.settings.ignore_index)
            found = nested_losses(
                asked,
                Candidates(readout.table, readout.bias),
                [readout.widths[size] for size in mine],
                [scales[size] for size in mine] if scales else None,
            )
            found = averaged(found, asked) if self.settings.reduction == "mean" else found
            losses |= dict(zip(mine, found.unbind(), strict=True))
        return losses


class Asked(NamedTuple):
    """What counts: hidden rows [N, D], their classes [N], negatives [K] or [N, K]."""

    hidden: Tensor
    positive: Tensor
    negatives: Tensor


def asked_of(hidden: Tensor, target: Tensor, negatives: Tensor, ignore_index: int) -> Asked:
    """The rows of hidden [..., D] whose target [...] is not ignored."""
    real = torch.nonzero(target.reshape(-1) != ignore_index).squeeze(1)
    own = negatives.ndim > 1
    others = negatives.reshape(-1, negatives.shape[-1])[real] if own else negatives
    return Asked(hidden.reshape(-1, hidden.shape[-1])[real], target.reshape(-1)[real], others)


def averaged(losses: Tensor, asked: Asked) -> Tensor:
    """Sums over rows as means; nan where there are no rows, as in torch."""
    return losses / len(asked.positive) if len(asked.positive) else losses * float("nan")


class Candidates:
    """Rows of the table by class, and what is added to their logits."""

    def __init__(
        self,
        table: Tensor,
        bias: Tensor | None,
        log_q: Tensor | None = None,
        *,
        sparse: bool = False,
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
    asked: Asked,
    candidates: Candidates,
    widths: Sequence[int],
    scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """The summed loss of each of ascending widths, from running logits [N, 1] and [N, K]."""
    hidden, positive, negatives = asked
    hit = negatives == positive[:, None]
    good, bad = candidates.rows(positive)[:, None], candidates.rows(negatives)
    start = candidates.offset(negatives).expand(hit.shape)
    if scales is None:
        start = start.masked_fill(hit, -torch.inf)
    owns = running(hidden, good, widths, candidates.offset(positive)[:, None])
    pairs = zip(owns, running(hidden, bad, widths, start), strict=True)
    losses: list[Tensor] = []
    for rank, (own, others) in enumerate(pairs):
        if scales is not None:
            # Masked last: a scale that multiplied -inf would have a gradient of nan.
            own, others = own * scales[rank], (others * scales[rank]).masked_fill(hit, -torch.inf)
        norm = torch.logaddexp(own[:, 0], others.logsumexp(1)) if hit.shape[1] else own[:, 0]
        losses.append((norm - own[:, 0]).sum())
    return torch.stack(losses)
