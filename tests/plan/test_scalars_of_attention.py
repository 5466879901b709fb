"""Attention that is scaled by a whole width, as in muP: the constant is that of the size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk

HEADS, WIDTH = 4, 32


class Net(nn.Module):
    """Attention with as many heads as eight units each make, or with one."""

    def __init__(self, width: int, heads: int, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.heads, self.form = width, heads, form
        self.table, self.head = nn.Embedding(30, width), nn.Linear(width, 3)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        x = self.table(ids)
        n, t, _ = x.shape
        q, k, v = (
            f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = FORMS[self.form](self, q, k, v)
        return self.head(mixed.transpose(1, 2).reshape(n, t, -1))


Attention = Callable[[Net, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Attention] = {
    "over the width": lambda m, q, k, v: (q @ k.mT / m.width).softmax(-1) @ v,
    "times its inverse": lambda m, q, k, v: (q @ k.mT * (1 / m.width)).softmax(-1) @ v,
    "over its root": lambda m, q, k, v: (q @ k.mT / math.sqrt(m.width)).softmax(-1) @ v,
    "shared, over fourth roots": lambda m, q, k, v: (lambda s: (s @ s.mT).softmax(-1) @ v)(
        q / q.shape[-1] ** 0.25
    ),
    "over a head": lambda m, q, k, v: (q @ k.mT / q.shape[-1]).softmax(-1) @ v,
    "scale of the width": lambda m, *qkv: F.scaled_dot_product_attention(*qkv, scale=1 / m.width),
    "scale of its root": lambda m, *qkv: F.scaled_dot_product_attention(
        *qkv, scale=1 / math.sqrt(m.width)
    ),
}


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_scaled_by_the_width_of_their_size(form: str, heads: int) -> None:
    ids = torch.arange(10).view(2, 5)
    doll = mk.convert(Net(WIDTH, heads, form).double(), (ids,), sizes=[8, 16, 32], nesting="sliced")
    for size in doll.sizes:
        small = mk.slice(doll, size)
        native = Net(size, max(1, heads * size // WIDTH), form).double()
        native.load_state_dict(small.state_dict(), strict=False)  # one form reads no keys
        torch.testing.assert_close(small(ids), native(ids), rtol=1e-10, atol=1e-12)
