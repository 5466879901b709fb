"""Classifiers for scope "output": logits per size of a representation (MRL, NeurIPS 2022).

    MRLHead   a classifier of its own for each size        (the paper's MRL)
    MRLEHead  one classifier whose columns all sizes share (the paper's MRL-E)

Either replaces the last linear of a model and returns {size: logits}. MatryoshkaLoss takes what
`outputs` returns and, for a cross entropy, computes all sizes at once without storing the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.outputs import Late, Moment, Outputs, Readout


class HeadError(MatryoshkafyError):
    """The sizes do not fit the representation."""


def checked_sizes(sizes: Sequence[int], width: int) -> tuple[int, ...]:
    """The sizes ascending; raises HeadError unless they are distinct and within 1..width."""
    found = tuple(sorted(sizes))
    if not found or len(set(found)) != len(found) or found[0] < 1 or found[-1] > width:
        raise HeadError(f"sizes {list(sizes)} of a head should be distinct and within 1..{width}")
    return found


class MRLHead(nn.Module):
    """One linear classifier per size: hidden [..., D] -> {size: [..., classes]}.

    Args:
        in_features: D, the width of the representation.
        num_classes: how many logits each size gives.
        sizes: ascending; the largest is at most D.
        bias: whether a bias is added.
    """

    def __init__(
        self, in_features: int, num_classes: int, sizes: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.sizes = checked_sizes(sizes, in_features)
        self.classifiers = nn.ModuleDict(
            {str(size): nn.Linear(size, num_classes, bias=bias) for size in self.sizes}
        )

    def forward(self, hidden: Tensor) -> dict[int, Tensor]:
        """hidden [..., D] -> {size: logits [..., classes]}."""
        return {size: self.logits(hidden, size) for size in self.sizes}

    def logits(self, hidden: Tensor, size: int) -> Tensor:
        """The logits of one size."""
        return self.classifiers[str(size)](hidden[..., :size])

    def outputs(self, hidden: Tensor) -> Outputs:
        """The same, computed on demand."""
        late = {size: Late(partial(self.logits, hidden, size)) for size in self.sizes}
        return Outputs(late, moment=Moment.of(self, hidden))

    def slice(self, size: int) -> nn.Linear:
        """The classifier of one size alone, a copy. Raises HeadError."""
        if size not in self.sizes:
            raise HeadError(f"this head has sizes {list(self.sizes)}, not {size}")
        found = self.classifiers[str(size)]
        assert isinstance(found, nn.Linear)
        return copy_linear(found.weight, found.bias)


class MRLEHead(nn.Module):
    """One classifier for all sizes: size m reads weight[:, :m]. All sizes cost one full product.

    Args:
        in_features: D, the width of the representation.
        num_classes: how many logits each size gives.
        sizes: ascending; the largest is at most D.
        bias: whether a bias is added.
    """

    def __init__(
        self, in_features: int, num_classes: int, sizes: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.sizes = checked_sizes(sizes, in_features)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, sizes: Sequence[int]) -> MRLEHead:
        """A head that shares a linear's parameters."""
        head = cls(linear.in_features, linear.out_features, sizes, bias=False)
        head.weight = linear.weight
        head.bias = linear.bias
        return head

    def reset_parameters(self) -> None:
        """As nn.Linear does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden: Tensor) -> dict[int, Tensor]:
        """hidden [..., D] -> {size: logits [..., classes]}, each added to the one before."""
        return dict(self.readout(hidden).logits_by_size())

    def readout(self, hidden: Tensor) -> Readout:
        """What a fused loss uses: hidden [..., D] and the weight."""
        return Readout(hidden, self.weight, self.bias, {size: size for size in self.sizes})

    def outputs(self, hidden: Tensor) -> Outputs:
        """The same on demand, with the readout."""
        readout = self.readout(hidden)
        late = {size: Late(partial(readout.logits, size)) for size in self.sizes}
        return Outputs(late, dict.fromkeys(self.sizes, readout), Moment.of(self, hidden))

    def slice(self, size: int) -> nn.Linear:
        """The classifier of one size alone, a copy. Raises HeadError."""
        if size not in self.sizes:
            raise HeadError(f"this head has sizes {list(self.sizes)}, not {size}")
        return copy_linear(self.weight[:, :size], self.bias)


def copy_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain linear with copies of a weight and bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
