"""Which form of an operator runs: the opaque one while tracing, a lean one in plain eager mode."""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError

PLAIN = (Tensor, torch.nn.Parameter)
Grads = tuple[Tensor | None, ...]


class Context(Protocol):
    """What autograd hands from a forward to its backward."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """Each tensor that was saved, or the None that was."""
        ...

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward."""
        ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say that outputs carry no gradient."""
        ...


class ArgsContext(Context, Protocol):
    """The same, with the arguments that are no tensors."""

    args: Sequence[Any]


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor and nothing (tracer, mode, transform) watches the calls.

    A meta tensor has no values, which the lean forms read.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class DoubleBackward(MatryoshkafyError):
    """A second derivative was asked of a nested operator."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"matryoshkafy::{name} has no double backward: nested layers are differentiable once; "
            "call backward without create_graph=True. For second derivatives nest with "
            "nesting='sliced' and call torch's own cross_entropy at each size"
        )
