"""Functions of torch.linalg, which torch leaves untyped: their types, said once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

_norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
vecdot = cast("Callable[[Tensor, Tensor], Tensor]", torch.linalg.vecdot)  # pyright: ignore[reportUnknownMemberType]


eigh = cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.eigh)  # pyright: ignore[reportUnknownMemberType]
solve = cast("Callable[[Tensor, Tensor], Tensor]", torch.linalg.solve)  # pyright: ignore[reportUnknownMemberType]


def vector_norm(x: Tensor, dims: Sequence[int], *, keepdim: bool = False) -> Tensor:
    """Return the 2-norm of x over dims."""
    return _norm(x, dim=tuple(dims), keepdim=keepdim)
