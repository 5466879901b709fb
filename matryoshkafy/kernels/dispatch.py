"""Which form of an operator runs: the opaque one while tracing, a lean one in plain eager mode."""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError

PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor and nothing (tracer, mode, transform) watches the calls."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class DoubleBackward(MatryoshkafyError):
    """A second derivative was asked of a nested operator."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"matryoshkafy::{name} has no double backward: nested layers are differentiable once; "
            "call backward without create_graph=True, or use matryoshkafy.kernels.reference"
        )
