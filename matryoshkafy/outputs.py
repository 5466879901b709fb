"""{size: output}, computed late, and the last linear of a model as one readout for all sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Outputs(dict):
    """{size: output}, where an output may be computed when it is first read.

    `readout` is the last linear of the model where the whole tail is one: losses use it to handle
    all sizes at the cost of one. What is computed late is computed in the mode (gradients,
    autocast) in which `outputs` was called.
    """

    def __init__(
        self, pending: Mapping[int, Callable[[], Any]], readout: Readout | None = None
    ) -> None:
        super().__init__(dict.fromkeys(pending))
        self.readout = readout
        self._pending = dict(pending)
        self._mode = _Mode()

    def __getitem__(self, size: int) -> Any:
        if size not in self:
            raise KeyError(f"size {size} is not among the sizes {list(self.keys())}")
        compute = self._pending.pop(size, None)
        if compute is not None:
            with self._mode.restored():
                super().__setitem__(size, compute())
        return super().__getitem__(size)

    def __iter__(self) -> Iterator[int]:
        return super().__iter__()

    def get(self, size: int, default: Any = None) -> Any:
        """Return the output of a size, or the default."""
        if size not in self:
            return default
        return self[size]

    def values(self) -> Any:
        """Return the outputs, ascending by size."""
        return [self[size] for size in self]

    def items(self) -> Any:
        """Return (size, output) pairs, ascending by size."""
        return [(size, self[size]) for size in self]

    def __repr__(self) -> str:
        return repr(dict(self.items()))


class _Mode:
    """Whether gradients and autocast were on."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
        self.dtypes = {d: torch.get_autocast_dtype(d) for d in self.autocast}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device in self.autocast:
                stack.enter_context(torch.autocast(device, self.dtypes[device]))
            yield


@dataclass(frozen=True)
class Readout:
    """The logits of size s are scale * hidden[..., :n] @ table[:, :n].T + bias, n = widths[s].

    hidden [..., D] is the full-width trunk value that enters the last linear, table [V, D], bias
    [V] or None, and widths gives the number of leading units of D for each size.
    """

    hidden: Tensor
    table: Tensor
    bias: Tensor | None
    widths: Mapping[int, int]
    scale: float = 1.0

    @property
    def scaled(self) -> Tensor:
        """hidden * scale."""
        return self.hidden if self.scale == 1 else self.hidden * self.scale

    def logits(self, size: int) -> Tensor:
        """The logits [..., V] of a size, stored in full."""
        width = self.widths[size]
        return F.linear(self.scaled[..., :width], self.table[:, :width], self.bias)
