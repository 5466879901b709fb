"""What adds up units is compared with their number: the constant is that of the size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk


class Net(nn.Module):
    """An embedding, two layers, and what a test makes of them."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.form = width, form
        self.table, self.head = nn.Embedding(30, width), nn.Linear(width, 3)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.vector = nn.Parameter(torch.rand(width))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> what the form gives"""
        return FORMS[self.form](self, self.first(self.table(ids)).tanh())


def length(h: Tensor) -> Tensor:
    """[.., D] -> [.., 1]"""
    return h.norm(dim=-1, keepdim=True)


FORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "norm times an inverse root": lambda m, h: m.head(h / (length(h) * m.width**-0.5).clamp(1e-8)),
    "norm over a root": lambda m, h: m.head(h / (length(h) / math.sqrt(m.width))),
    "root over norm": lambda m, h: m.head(h * (math.sqrt(m.width) / length(h))),
    "width over squares": lambda m, h: m.head(
        h * torch.sqrt(m.width / h.square().sum(-1, keepdim=True))
    ),
    "head of muP": lambda m, h: m.head(h) / m.width,
    "vector": lambda m, h: (h @ m.vector) / m.width,
    "negative sum": lambda m, h: -h.sum(-1) / m.width,
    "nansum": lambda m, h: h.nansum(-1) / m.width,
    "absolute": lambda m, h: (h - m.second(h)).norm(p=1, dim=-1) / m.width,
    "cdist": lambda m, h: torch.cdist(h, m.table.weight) / math.sqrt(m.width),
    "pairwise": lambda m, h: F.pairwise_distance(h, m.second(h)) / math.sqrt(m.width),
    "squares": lambda m, h: torch.exp(-(h[:, 1:] - h[:, :1]).square().sum(-1) / m.width),
    "alpha": lambda m, h: torch.add(m.head(h)[..., 0], h.sum(-1), alpha=1 / m.width),
    "alpha of a difference": lambda m, h: torch.sub(
        m.head(h)[..., 0], h.sum(-1), alpha=1 / m.width
    ),
    "value of addcmul": lambda m, h: torch.addcmul(
        m.head(h)[..., 0], h.sum(-1), h.sum(-1), value=1 / m.width
    ),
    "filled": lambda m, h: m.head(h + torch.full_like(h, 1 / h.shape[-1])),
    "centred": lambda m, h: m.head(h - h @ (torch.ones(m.width, 1, dtype=h.dtype) / m.width)),
    "mean times width": lambda m, h: h.mean(-1) * m.width,
    "mean times root": lambda m, h: h.mean(-1) * m.width**0.5,
}


class Config:
    """Numbers that happen to be the width, and its inverse."""

    softcap = 36.0
    hidden: int = 36


class Tuned(Net):
    """Hyperparameters beside the width of the model, 36, and widths that are written as numbers."""

    FLOOR = 1 / 36

    def __init__(
        self, width: int, form: str, temperature: float = 1 / 36, hidden: int = 36
    ) -> None:
        super().__init__(width, form)
        self.temperature, self.config = temperature, Config()
        self.root = (6 * 6) ** -0.5
        self.hidden = hidden if width == hidden else width

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> logits [N, T, 3]"""
        h = self.first(self.table(ids)).tanh()
        if self.form == "temperature":
            h = (h @ h.mT / self.temperature).softmax(-1) @ h
        elif self.form == "class":
            h = h * self.FLOOR
        elif self.form == "configuration":
            h = (h / self.config.softcap).tanh() * self.config.softcap
        elif self.form == "written root":
            h = h * self.root
        else:
            h = h * self.hidden
        return self.head(h)


TUNED = ("temperature", "class", "configuration", "written root", "whole default")


@pytest.mark.parametrize("form", TUNED)
def test_a_number_that_the_code_gives_elsewhere_is_no_width(form: str) -> None:
    ids = torch.arange(10).view(2, 5)
    doll = mk.convert(Tuned(36, form).double(), (ids,), sizes=[18, 36], nesting="sliced")
    small, native = mk.slice(doll, 18), Tuned(18, form).double()
    native.load_state_dict(small.state_dict(), strict=False)
    torch.testing.assert_close(small(ids), native(ids), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_total_is_compared_with_the_units_of_its_size(form: str) -> None:
    ids = torch.arange(10).view(2, 5)
    doll = mk.convert(Net(36, form).double(), (ids,), sizes=[18, 36], nesting="sliced")
    cut, small = mk.slice(doll, 18), Net(18, form).double()
    small.load_state_dict(cut.state_dict(), strict=False)  # without what the form does not read
    other = torch.arange(12).view(3, 4)
    torch.testing.assert_close(cut(other), small(other), rtol=1e-12, atol=1e-12)
    assert len(doll.plan.scalars) == 1


class Fixed(Net):
    """The same with a number that happens to stand in the code."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        return self.head(self.table(ids)) / 36


def test_a_number_that_the_code_holds_stays() -> None:
    ids = torch.arange(10).view(2, 5)
    doll = mk.convert(Fixed(36, "vector").double(), (ids,), sizes=[18, 36], nesting="sliced")
    cut = mk.slice(doll, 18)
    rows = cut.state_dict()
    h = rows["table.weight"][ids]
    expected = (h @ rows["head.weight"].T + rows["head.bias"]) / 36
    torch.testing.assert_close(cut(ids), expected, rtol=1e-12, atol=1e-12)
    assert not doll.plan.scalars
