"""A cross entropy that keeps a model from recommending what its user already has.

Ranked among all items, a user's own ones take first places: a model that scores by the table of its
inputs finds an item most like itself. A shop leaves them out; where a protocol does not, the model
has to learn it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from examples.fmrlrec.data import PADDING
from matryoshkafy.losses import nested_cross_entropy
from matryoshkafy.losses.matryoshka import Weights, weighed


def seen_items(inputs: Tensor, *, causal: bool) -> Tensor:
    """The items [B, T, T] that each position of histories [B, T] knows, 0 where there is none.

    A `causal` model knows those up to the position itself, another the whole row but its masks
    (negative ids).
    """
    seen = inputs.clamp_min(PADDING).unsqueeze(1).expand(-1, inputs.shape[1], -1)
    return seen.tril() if causal else seen


class UnseenLoss(mk.MatryoshkaLoss):
    """Cross entropy over all items at every size, seen ones `times` times in the denominator.

    -log(exp(z_target) / (sum of exp(z) over all + (times - 1) * sum of exp(z) over seen ones)):
    scores are adjusted in training alone (Menon et al. 2021, arXiv 2007.07314). Called with outputs
    [B, T, items], targets [B, T] and seen items [B, T, K], 0 for none in both; an item that stands
    twice counts twice.
    """

    def __init__(
        self, sizes: Sequence[int], times: float, weights: Weights, scales: Weights
    ) -> None:
        criterion = nn.CrossEntropyLoss(ignore_index=PADDING)
        super().__init__(criterion, sizes, weights, learn_scales=scales)
        self.times = times

    def criteria(
        self, outputs: Mapping[int, object], targets: tuple[object, ...], weights: dict[int, float]
    ) -> tuple[Tensor, dict[int, Tensor], Mapping[int, object] | None]:
        """The weighted sum, the loss of each size, and no scores."""
        target, seen = cast("tuple[Tensor, Tensor]", targets)
        losses: dict[int, Tensor] = {}
        for size, readout in self.readouts(outputs, (target,), weights).items():
            width, scale = readout.widths[size], self.scales().get(size, 1.0)
            bias = None if readout.bias is None else readout.bias * scale
            hidden = readout.scaled[..., :width] * scale
            losses[size] = self.mean(hidden, readout.table[:, :width], bias, target, seen)
        return *weighed(losses, weights), None

    def mean(
        self, hidden: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, seen: Tensor
    ) -> Tensor:
        """The mean over real targets, of hidden values [..., D] of one size."""
        plain = nested_cross_entropy(
            hidden, table, target, [table.shape[1]], bias=bias, ignore_index=PADDING,
            reduction="none",
        )  # fmt: skip
        assert isinstance(plain, Tensor)
        over_all = plain + scores_among(hidden, table, bias, target[..., None])[..., 0]
        theirs = scores_among(hidden, table, bias, seen)
        real = target != PADDING
        counts = (seen != PADDING) & (seen != target[..., None]) & real[..., None]
        # Filled before exp, whose gradient would be nan where it overflows.
        share = (theirs - over_all[..., None]).masked_fill(~counts, -torch.inf).exp().sum(-1)
        return ((plain + torch.log1p((self.times - 1) * share)) * real).sum() / real.sum()


def scores_among(hidden: Tensor, table: Tensor, bias: Tensor | None, items: Tensor) -> Tensor:
    """The scores [..., K] of some items [..., K] for hidden values [..., D]."""
    scores = (F.embedding(items, table) @ hidden[..., None])[..., 0]
    return scores if bias is None else scores + bias[items]
