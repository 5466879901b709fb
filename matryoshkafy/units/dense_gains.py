"""Gains as matrices: a post-norm model that `rotate` may turn exactly, in a class of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from matryoshkafy.units.permute import OrderError


class DenseGain(nn.Module):
    """A norm without gain, and a linear that starts as the diagonal of the gain it had."""

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        like = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        bias = getattr(norm, "bias", None)
        kind = cast("Callable[..., nn.Module]", type(norm))
        self.norm = kind(width, eps=norm.eps, elementwise_affine=False)
        self.gain = nn.Linear(width, width, bias=bias is not None, **like)
        with torch.no_grad():
            self.gain.weight.copy_(torch.diag(norm.weight))
            if bias is not None:
                self.gain.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gained norm of x [..., width]."""
        return self.gain(self.norm(x))


def dense_gains(model: nn.Module) -> tuple[str, ...]:
    """Replace every norm of a model that has a gain by a `DenseGain`, in place, exactly.

    Behind a post-norm's gain the stream may then turn: each stretch between two norms is an axis of
    its own, and `rotate` finds the best basis of each. It costs width squared numbers a norm, and
    the slices are no longer the stock class. Convert after it.

    Args:
        model: a module whose norms are `nn.LayerNorm` or `nn.RMSNorm` over one axis.

    Returns:
        The names of the norms that were replaced.

    Raises:
        OrderError: no norm of these kinds has a gain.
    """
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    found = {
        name: module
        for name, module in modules
        if isinstance(module, nn.LayerNorm | nn.RMSNorm)
        and type(module) in (nn.LayerNorm, nn.RMSNorm)
        and getattr(module, "weight", None) is not None
        and len(module.normalized_shape) == 1
    }
    if not found:
        raise OrderError(
            f"{type(model).__name__} has no nn.LayerNorm or nn.RMSNorm with a gain; expected one "
            "at least. Norms of another class keep their gains: rotate without this"
        )
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, DenseGain(module))
    return tuple(found)
