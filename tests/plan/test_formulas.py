"""Constants that a line computes of the width by a formula of its own are those of the size.

The oracle is the user's class, built small and given the slice's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from tests.plan import small_class

WIDTH, SMALL = 32, 8


def third_of(width: int) -> float:
    """A number that a function makes of a width."""
    return (width / 3) ** -0.5


def entropy(width: int) -> float:
    """Of a Gaussian, without its scale."""
    total = width * (1 + math.log(2 * math.pi))
    return 0.5 * total


class Net(nn.Module):
    """An embedding, a layer, a convolution, and what a test makes of them."""

    def __init__(self, width: int, form: str, layers: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.form, self.layers = width, form, layers
        self.scale = math.sqrt(3 * width)
        self.inner, self.widths = 2 * width, [width, width]
        self.norm = third_of(width)
        self.table, self.layer = nn.Embedding(30, width), nn.Linear(width, width)
        self.conv, self.head = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        return self.head(FORMS[self.form](self, self.layer(self.table(ids))))


def of_attribute(m: Net, h: Tensor) -> Tensor:
    return (h @ h.mT / m.scale).softmax(-1) @ h


def of_shape(_: Net, h: Tensor) -> Tensor:
    batch, length, width = h.shape
    scale = (width * 3) ** -0.5
    return (h @ h.mT * scale).softmax(-1) @ h


def of_length(m: Net, h: Tensor) -> Tensor:
    return h @ h.mT / (math.sqrt(m.width) * h.shape[1]) @ h


def of_function(m: Net, h: Tensor) -> Tensor:
    return h * third_of(m.width)


def of_function_before(m: Net, h: Tensor) -> Tensor:
    return h.tanh() * m.norm


def of_fan(m: Net, h: Tensor) -> Tensor:
    w = m.conv.weight
    fan = w[0].numel()
    spread, mean = torch.var_mean(w, (1, 2), keepdim=True)
    w = (w - mean) * torch.rsqrt((spread * fan).clamp(min=1e-4))
    return F.conv1d(h.mT, w, m.conv.bias, padding=1).mT


def of_likelihood(m: Net, h: Tensor) -> Tensor:
    return h - 0.5 * (h.square().sum(-1, keepdim=True) + m.width * math.log(2 * math.pi))


def of_entropy(m: Net, h: Tensor) -> Tensor:
    return h + (h.abs().log1p().sum(-1, keepdim=True) + entropy(m.width))


def of_one_more(m: Net, h: Tensor) -> Tensor:
    return h + h.sum(-1, keepdim=True) / (m.width + 1)


def of_a_tenth(m: Net, h: Tensor) -> Tensor:
    return h + 0.1 / m.width


def of_twice(m: Net, h: Tensor) -> Tensor:
    return (h @ h.mT / m.inner**0.5).softmax(-1) @ h


def of_default(m: Net, h: Tensor, scale: float | None = None) -> Tensor:
    scale = scale or 1 / math.sqrt(5 * m.width)
    return (h @ h.mT * scale).softmax(-1) @ h


def of_bessel(_: Net, h: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().sum(-1, keepdim=True) / (h.size(-1) - 1) + 1e-5).sqrt()


def of_rounds_beside(m: Net, h: Tensor) -> Tensor:
    for k, layer in enumerate([m.layer, m.layer]):
        h = layer(h).tanh() / m.widths[k]
    return h


FORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    name.removeprefix("of_"): made
    for name, made in list(globals().items())
    if name.startswith("of_")
}


def of_depth(m: Net, h: Tensor) -> Tensor:
    return h + h.tanh() / math.sqrt(2 * m.layers)


def of_rounds(_: Net, h: Tensor) -> Tensor:
    for k in range(1, 3):
        h = h + torch.tanh(h * (k / 32))
    return h


def of_ratio(m: Net, h: Tensor) -> Tensor:
    _, _, width = h.shape
    rows, _ = m.layer.weight.shape
    return h + m.layer.bias.tile((width // rows,))


OTHERS = {"ratio": of_ratio, "depth": of_depth, "rounds": of_rounds}
FORMS.update(OTHERS)
COUNTS = {**dict.fromkeys(OTHERS, 0), "rounds_beside": 2}


def moved(form: str) -> tuple[mk.Doll, float]:
    """Return the doll, and how far its slice is off the small class with the same weights."""
    return small_class.moved(lambda width: Net(width, form), WIDTH, SMALL)


@pytest.mark.parametrize("form", FORMS)
def test_the_slice_computes_as_the_small_class(form: str) -> None:
    doll, error = moved(form)
    assert error < 1e-12
    assert len(doll.plan.scalars) == COUNTS.get(form, 1)


def of_logarithm(m: Net, h: Tensor) -> Tensor:
    return h / math.log(m.width)


def of_bound(m: Net, h: Tensor) -> Tensor:
    return h.clamp(max=4 / m.width)


def of_a_literal(m: Net, h: Tensor) -> Tensor:
    return (h * (16 / m.width)).tanh() * 0.5


def of_a_rounded_part(m: Net, h: Tensor) -> Tensor:
    return h / (m.width // 3)


def of_two(m: Net, h: Tensor, rank: int = 5) -> Tensor:
    return h * math.sqrt(m.width / rank)


SAID: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "logarithm": (of_logarithm, "3.46574"),
    "bound": (of_bound, "0.125"),
    "literal": (of_a_literal, "0.5"),
    "rounded": (of_a_rounded_part, "10"),
    "two": (of_two, "2.52982"),
}


@pytest.mark.parametrize("form", SAID)
def test_a_number_that_may_be_of_a_width_is_said(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    made, number = SAID[form]
    monkeypatch.setitem(FORMS, form, made)
    doll, error = moved(form)
    assert error > 1e-3
    lines = [r for r in doll.plan.remarks if r.startswith(f"number: {number} at test_formulas.py:")]
    assert len(lines) == 1 and "width" in lines[0].partition("computes it of")[2]


def test_a_plain_number_is_not_spoken_of() -> None:
    doll, _ = moved("a_tenth")
    assert not [r for r in doll.plan.remarks if r.startswith("number:")]


class Interest(nn.Module):
    """Weighs histories by a net of queries and keys, far before the number (DIN, arXiv
    1706.06978, as it is often written).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net, self.one = nn.Linear(2 * width, width // 2), nn.Linear(width // 2, 1)

    def forward(self, queries: Tensor, keys: Tensor, features: Tensor | None) -> Tensor:
        """queries [N, D], keys [N, T, D], features [30, 64] -> [N, D]"""
        units, length = queries.shape[-1], keys.shape[1]
        queries = queries.repeat(1, length).view(-1, length, units)
        hidden = torch.sigmoid(self.net(torch.cat([queries, keys], -1)))
        scores = self.one(hidden).transpose(-1, -2).squeeze(1)
        scores = scores.masked_fill(scores > 1e6, 0.0).unsqueeze(1) / (units**0.5)
        scores = scores if features is None else scores + features.sum(-1).mean()
        return (scores @ keys).squeeze(1)


class Fields(nn.Module):
    """Histories of items of two fields, beside frozen features or none."""

    def __init__(self, width: int, features: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(30, width) for _ in range(2))
        self.interest, self.head = Interest(2 * width), nn.Linear(2 * width, 5)
        self.register_buffer("features", features)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, 5]"""
        keys = torch.stack([table(ids) for table in self.tables], 2).flatten(2)
        return self.head(self.interest(keys[:, -1], keys, self.features))


def test_a_number_of_a_shape_that_the_line_asks_for_follows_it_from_afar() -> None:
    doll, error = small_class.moved(Fields, WIDTH, SMALL)
    assert error < 1e-12
    assert [s.value for s in doll.plan.scalars] == [pytest.approx((2 * WIDTH) ** 0.5)]


def test_a_number_of_a_shape_that_may_be_another_s_is_said() -> None:
    model = Fields(WIDTH, torch.rand(30, 2 * WIDTH)).eval()
    doll = mk.convert(model, (torch.randint(0, 30, (2, 5)),), sizes=[8, 32], nesting="sliced")
    assert not doll.plan.scalars
    assert any(r.startswith("number: 8 at") and "queries.shape[-1]" in r for r in doll.plan.remarks)


class Weighed(nn.Module):
    """A sum over units, times a weight that stays, whatever it equals."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, h: Tensor) -> Tensor:
        """[.., D] -> [.., 1]"""
        return h.square().sum(-1, keepdim=True) * self.weight


class Penalised(nn.Module):
    """Units, and a penalty of 0.25 beside them; or of 1 / sqrt(units), handed over alike."""

    def __init__(self, width: int, weight: float = 0.25, rooted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(30, width), nn.Linear(width, 5)
        self.penalty = Weighed(weight) if not rooted else Rooted(scale=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        h = self.table(ids)
        return self.head(h) + self.penalty(h)


class Rooted(nn.Module):
    """A sum over units, times what is handed over."""

    def __init__(self, scale: float = 0.25) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, h: Tensor) -> Tensor:
        """[.., D] -> [.., 1]"""
        return h.sum(-1, keepdim=True) * self.scale


@pytest.mark.parametrize("rooted", [False, True])
def test_a_typed_number_that_is_handed_on_stays_and_a_root_follows(rooted: bool) -> None:
    doll, error = small_class.moved(lambda width: Penalised(width, rooted=rooted), 16, 4)
    assert error < 1e-12
    assert len(doll.plan.scalars) == rooted
