"""What the nested cross entropy is computed from, and what is computed of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from matryoshkafy.kernels.tiling import Range


@dataclass(frozen=True)
class LossOptions:
    """Widths ascend; weights and scales belong to them; smoothing is that of F.cross_entropy.

    Scales are numbers, or tensors of one: a device is not asked for their values.
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...]
    ignore_index: int
    smoothing: float
    scales: tuple[float | Tensor, ...] | None = None

    @property
    def blocks(self) -> list[Range]:
        """What each size adds to the one before."""
        return list(zip((0, *self.widths), self.widths, strict=False))

    @property
    def slopes(self) -> tuple[float | Tensor, ...]:
        """What the gradient of each size is multiplied with."""
        if self.scales is None:
            return self.weights
        return tuple(w * s for w, s in zip(self.weights, self.scales, strict=True))

    def scaled(self, logits: Tensor, size: int) -> Tensor:
        """The scores of a size (its number)."""
        return logits if self.scales is None else logits * self.scales[size]


@dataclass(frozen=True)
class Gradients:
    """Of hidden [N, D], table [V, D], bias [V] and scales [sizes]; None where not needed."""

    hidden: Tensor | None
    table: Tensor | None
    bias: Tensor | None
    scales: Tensor | None = None

    @property
    def needed(self) -> bool:
        """Whether any is needed."""
        grads = (self.hidden, self.table, self.bias, self.scales)
        return any(grad is not None for grad in grads)


@dataclass(frozen=True)
class Problem:
    """hidden [N, D], table [V, D], bias [V] or None, target [N]."""

    hidden: Tensor
    table: Tensor
    bias: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class Chunk:
    """Some rows: x [R, D], dx [R, D], targets [R], the scale of their losses, and the scratch.

    moments [sizes, R]: the derivative of each loss by the logarithm of its size's scale.
    """

    x: Tensor
    dx: Tensor
    target: Tensor
    scale: float | Tensor
    logits: Tensor
    slots: list[Tensor]
    moments: Tensor

    @property
    def column_scale(self) -> float | Tensor:
        """The scale, as what a [R, ...] tensor is multiplied with."""
        return self.scale[:, None] if isinstance(self.scale, Tensor) else self.scale
