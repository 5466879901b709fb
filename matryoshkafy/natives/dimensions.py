"""Which prefixes of a model's vector stand for themselves, as embedding servers may cut them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.measure import floats_of
from matryoshkafy.dolls.slice import parts_of, slice
from matryoshkafy.natives.inputs import fresh_calls, outputs


def dimensions(small: nn.Module) -> tuple[int, ...]:
    """Return the sizes whose output is a prefix of this model's own, and its width; () if none is.

    With scope="output" alone: elsewhere a smaller size computes other values, not fewer of them.
    """
    plan = parts_of(small)[1]
    if plan.options.scope != "output":
        return ()
    call = fresh_calls(small)[0]
    whole = next(floats_of(outputs(small, call)))
    found = [
        size
        for size in plan.sizes[:-1]
        if _is_prefix(next(floats_of(outputs(slice(small, size), call))), whole)
    ]
    return (*found, whole.shape[-1]) if found else ()


def _is_prefix(part: Tensor, whole: Tensor) -> bool:
    same = part.shape[:-1] == whole.shape[:-1] and part.shape[-1] < whole.shape[-1]
    return same and torch.allclose(part, whole[..., : part.shape[-1]], rtol=1e-5, atol=1e-6)
