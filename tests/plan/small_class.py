"""The oracle of constants: the user's class, built small and given the slice's weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import matryoshkafy as mk


def moved(make: Callable[[int], nn.Module], width: int, small: int) -> tuple[mk.Doll, float]:
    """Return the doll of make(width), and how far its slice is off make(small) with its weights."""
    ids = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(1))
    doll = mk.convert(make(width).double().eval(), (ids,), sizes=[small, width], nesting="sliced")
    part, own_class = mk.slice(doll, small), make(small).double().eval()
    own = own_class.state_dict()
    given = {k: v for k, v in part.state_dict().items() if own[k].shape == v.shape}
    own_class.load_state_dict({**own, **given})
    with torch.no_grad():
        ours, theirs = part(ids), own_class(ids)
    return doll, float((ours - theirs).abs().max() / theirs.abs().max())
