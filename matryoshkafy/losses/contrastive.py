"""A contrastive criterion to put into MatryoshkaLoss(..., normalize=True)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(anchor: Tensor, positive: Tensor, temperature: float = 0.05) -> Tensor:
    """The cross entropy of each anchor with its positive against all positives (Oord et al. 2018).

    Args:
        anchor: [B, d].
        positive: [B, d], the positive of each anchor.
        temperature: what cosines are divided by; use functools.partial to set it in a loss.
    """
    scores = anchor @ positive.t() / temperature
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
