"""relative_error(): how far two results are apart, whatever their structure."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def relative_error(a: Any, b: Any) -> float:
    """Return the largest difference of two results, relative to the largest finite value of each
    tensor.
    """
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return max((_tensor_error(x, y) for x, y in pairs if isinstance(y, torch.Tensor)), default=0.0)


def _tensor_error(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if not (y.is_floating_point() or y.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    scale = y[y.isfinite()].abs().max().item() if bool(y.isfinite().any()) else 0.0
    worst = (x - y).abs()[~same].max().item()
    return worst / max(scale, 1e-30) if worst == worst else float("inf")
