"""Constants that a line takes of a dict, a base class, a configuration, a function or a constructor
are followed to where they are computed; what is not found is said.

The oracle is the user's class, built small and given the slice's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from tests.plan import constants_beside, small_class
from tests.plan.constants_beside import Base, Config, Scaled, scale_of

WIDTH, SMALL = 32, 8
GAINS = {"tanh": 5 / 3, "relu": 2**0.5}


class Net(Base):
    """An embedding, a layer, and a number of the width kept in many ways."""

    def __init__(self, width: int, form: str, length: int = 32, alpha: int = 1024) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.setup(width)
        self.config, self.form, self.width = Config(width), form, width
        self.settings = {"inner": math.sqrt(3 * width), "outer": 0.7}
        self.factors = [math.sqrt(2 * width), 0.7]
        setattr(self, "rate", math.sqrt(5 * width))  # noqa: B010  as people write it
        self.gain = GAINS["tanh"] / math.sqrt(width)
        self.torch_gain = nn.init.calculate_gain("tanh") / math.sqrt(width)
        self.scaled, self.beside = Scaled(math.sqrt(2 * width)), Inner(0.7 / math.sqrt(width))
        self.register_buffer("held", torch.tensor(math.sqrt(7 * width)), persistent=False)
        self.thirds, self.rest = divmod(width, 5)
        self.set_scale(width / 8)
        self.slope = nn.LeakyReLU(1 / (3 * width))
        self.shift = nn.Parameter(torch.ones(()))
        self.max_len, self.ratio = length, alpha / width
        self.either = 0.3 if width > 16 else 0.7
        self.table, self.layer = nn.Embedding(30, width), nn.Linear(width, width)
        self.back, self.head = nn.Linear(width, 12), nn.Linear(width, 5)

    def set_scale(self, value: float) -> None:
        """Keep a scale."""
        self.kept = value

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        return self.head(FORMS[self.form](self, self.layer(self.table(ids))))


class Inner(nn.Module):
    """Computes what it was made with."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]"""
        return x + self.start * torch.tanh(x)


def of_base_class(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h * m.scale)


def of_property_of_config(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h * m.config.rescale)


def of_dict(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h / m.settings["inner"]) * m.settings["outer"]


def of_list(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h / m.factors[0]) * m.factors[1]


def of_setattr(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h / m.rate)


def of_buffer(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h / m.held)


def of_gain(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h) * m.gain


def of_torch_gain(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h) * m.torch_gain


def of_function_beside(m: Net, h: Tensor) -> Tensor:
    return h * scale_of(m.width)


def of_module_beside(m: Net, h: Tensor) -> Tensor:
    return h * constants_beside.scale_of(m.width)


def of_constructor_beside(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(m.scaled(h))


def of_constructor(m: Net, h: Tensor) -> Tensor:
    return m.beside(h)


def of_walrus(_: Net, h: Tensor) -> Tensor:
    if (units := h.shape[-1]) > 4:
        h = h / (3 * units) ** 0.5
    return h


def of_grown(m: Net, h: Tensor) -> Tensor:
    scale = 3.0
    scale *= m.width
    return torch.tanh(h / scale)


def of_setter(m: Net, h: Tensor) -> Tensor:
    return h * m.kept


def of_joined(m: Net, h: Tensor) -> Tensor:
    both = torch.cat([h, m.layer(h)], -1)
    return (F.normalize(both, dim=-1) * math.sqrt(both.shape[-1]))[..., : h.shape[-1]]


FORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    name.removeprefix("of_"): made
    for name, made in list(globals().items())
    if name.startswith("of_")
}


def moved(form: str) -> tuple[mk.Doll, float]:
    """Return the doll, and how far its slice is off the small class with the same weights."""
    return small_class.moved(lambda width: Net(width, form), WIDTH, SMALL)


@pytest.mark.parametrize("form", FORMS)
def test_the_slice_computes_as_the_small_class(form: str) -> None:
    doll, error = moved(form)
    assert error < 1e-6 if form == "buffer" else error < 1e-12  # a buffer is float32 at first
    assert len(doll.plan.scalars) == 1
    assert not [r for r in doll.plan.remarks if r.startswith("number:")]


def in_torch(m: Net, h: Tensor) -> Tensor:
    return h * math.sqrt(nn.init._calculate_correct_fan(m.layer.weight, "fan_in") / 3)


def in_parts(m: Net, h: Tensor) -> Tensor:
    return torch.tanh(h) * m.thirds


def in_weight(m: Net, h: Tensor) -> Tensor:
    return h + m.layer.weight.pow(2).sum() / m.layer.weight.numel()


def in_error(m: Net, h: Tensor) -> Tensor:
    return h + m.back(h.tanh()).pow(2).sum(-1, keepdim=True) / m.width


def in_pairs(m: Net, h: Tensor) -> Tensor:
    products = h[..., :, None] * h[..., None, :]
    return h + products.sum((-1, -2)).unsqueeze(-1) / (m.width * (m.width - 1))


def in_layer(m: Net, h: Tensor) -> Tensor:
    return m.slope(h)


def in_bound(m: Net, h: Tensor) -> Tensor:
    return h.clamp(max=0.1 * math.log(m.width))


def in_power(m: Net, h: Tensor) -> Tensor:
    return h.abs() ** (0.2 * math.log(m.width))


def in_choice(m: Net, h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0.2 * math.log(m.width))


def in_parameter(m: Net, h: Tensor) -> Tensor:
    return h + m.shift * m.width


def in_larger(m: Net, h: Tensor) -> Tensor:
    return h * max(m.width, 16) ** -0.5


def in_either(m: Net, h: Tensor) -> Tensor:
    return h * m.either


def in_ratio(m: Net, h: Tensor) -> Tensor:
    return h * m.ratio


SAID: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "torch": (in_torch, "3.26599"),
    "parts": (in_parts, "6"),
    "weight": (in_weight, "1024"),
    "error": (in_error, "32"),
    "pairs": (in_pairs, "992"),
    "layer": (in_layer, "0.0104167"),
    "bound": (in_bound, "0.346574"),
    "power": (in_power, "0.693147"),
    "choice": (in_choice, "0.693147"),
    "parameter": (in_parameter, "32"),
    "larger": (in_larger, "0.176777"),
    "either": (in_either, "0.3"),
    "ratio": (in_ratio, "32"),
}


@pytest.mark.parametrize("form", SAID)
def test_a_number_that_may_be_of_a_width_is_said(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    made, number = SAID[form]
    monkeypatch.setitem(FORMS, form, made)
    doll, error = moved(form)
    assert error > 1e-3
    file = "test_formulas_elsewhere.py"
    lines = [r for r in doll.plan.remarks if r.startswith(f"number: {number} at {file}:")]
    assert len(lines) == 1


def by_row(_: Net, h: Tensor) -> Tensor:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=h.dtype)
    return h + (h[:, :2].mean(-1) * rows[0]).sum(1)[:, None, None] * rows[1][0]


def test_a_row_of_a_constant_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "row", by_row)
    doll, error = moved("row")
    assert error < 1e-12 and not doll.plan.scalars


def by_length(m: Net, h: Tensor) -> Tensor:
    return h / math.sqrt(m.max_len)


def test_a_length_that_equals_a_width_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "none", by_length)
    doll, error = moved("none")
    assert error < 1e-12 and not doll.plan.scalars


class Modulated(nn.Module):
    """A convolution whose weight is scaled by its fan and by a style (StyleGAN2)."""

    def __init__(self, units: int, kernel: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(1, units, units, kernel, kernel))
        self.scale, self.padding = 1 / math.sqrt(units * kernel**2), kernel // 2
        self.first, self.last = nn.Conv2d(3, units, 1), nn.Conv2d(units, 4, 1)
        self.style = nn.Linear(3, units)

    def forward(self, image: Tensor) -> Tensor:
        """image [1, 3, H, W] -> [1, 4, H, W]"""
        style = self.style(image.mean((2, 3)))
        weight = self.scale * self.weight * style[:, None, :, None, None]
        return self.last(F.conv2d(self.first(image), weight[0], padding=self.padding))


def test_the_fan_of_a_modulated_convolution_follows_its_inputs() -> None:
    image = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    model, small = Modulated(WIDTH).double().eval(), Modulated(SMALL).double().eval()
    doll = mk.convert(model, (image,), sizes=[SMALL, WIDTH], nesting="sliced")
    part = mk.slice(doll, SMALL)
    small.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(image), small(image))


class Stages(nn.Module):
    """Layers made in a loop over widths, each scaled by its own."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.stages = nn.ModuleList(Stage(into, out) for into, out in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, widths[0]] -> [N, widths[-1]]"""
        for stage in self.stages:
            x = stage(x)
        return x


class Stage(nn.Module):
    """A layer, and a scale of its width."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(into, out), out**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [N, into] -> [N, out]"""
        return self.layer(x).tanh() * self.scale


def test_a_loop_over_widths_counts_no_rounds() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    model, small = Stages([6, 32, 32, 4]).double().eval(), Stages([6, 8, 8, 4]).double().eval()
    part = mk.slice(mk.convert(model, (x,), sizes=[SMALL, WIDTH], nesting="sliced"), SMALL)
    small.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(x), small(x))


class Handed(Net):
    """Is given a number that nobody computes where it can be read."""

    def __init__(self, width: int, form: str, values: list[float]) -> None:
        super().__init__(width, form)
        self.given = values.pop()


def test_a_number_of_which_nothing_is_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "given", lambda m, h: torch.tanh(h * m.given))
    ids = torch.randint(0, 30, (2, 5))
    for number, said in ((math.sqrt(3 / WIDTH), 1), (0.3, 0)):
        doll = mk.convert(
            Handed(WIDTH, "given", [number]), (ids,), sizes=[SMALL, WIDTH], nesting="sliced"
        )
        lines = [r for r in doll.plan.remarks if r.startswith("number:")]
        assert len(lines) == said
        assert not said or "where its line takes it from is not found" in lines[0]


class Heads(nn.Module):
    """Attention by heads of a fixed size."""

    def __init__(self, width: int, units: int = 8) -> None:
        super().__init__()
        self.units, self.heads = units, width // units
        self.scaling = (width // self.heads) ** -0.5
        self.table, self.qkv = nn.Embedding(30, width), nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        n, t = ids.shape
        parts = self.qkv(self.table(ids)).view(n, t, 3, self.heads, self.units)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scaling @ k.mT).softmax(-1)
        return self.head((scores @ v).transpose(1, 2).reshape(n, t, -1))


def test_the_scale_of_a_head_that_stays_whole_is_not_spoken_of() -> None:
    doll = mk.convert(Heads(64), (torch.randint(0, 30, (2, 5)),), sizes=[16, 64], nesting="sliced")
    assert not [r for r in doll.plan.remarks if r.startswith("number:")]
    assert not doll.plan.scalars


@dataclass
class Shape:
    """A configuration."""

    units: int = 2560
    spread: float = 0.0177


class Handing(nn.Module):
    """Keeps shape.units under its own name, beside a number that is computed of it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units, self.gain = shape.units, shape.units**0.25 / shape.spread
        self.table, self.layer = nn.Embedding(30, self.units), nn.Linear(self.units, self.units)
        self.head = nn.Linear(self.units, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        return self.head(torch.tanh(self.layer(self.table(ids)) * self.gain / 100))


def test_a_width_that_is_kept_under_its_own_name_is_still_a_name() -> None:
    _, error = small_class.moved(lambda width: Handing(Shape(width)), WIDTH, SMALL)
    assert error < 1e-12


class Gains(nn.Module):
    """Gains of nGPT: numbers of the units that a product sums over, beside gains of its outputs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units, inner = shape.units, shape.units // 2
        self.rooted, self.gain = shape.units**0.5, shape.units**0.25 / shape.spread
        self.table, self.up = nn.Embedding(30, self.units), nn.Linear(self.units, inner)
        self.down, self.head = nn.Linear(inner, self.units), nn.Linear(self.units, 5)
        self.of_up = nn.Parameter(torch.linspace(0.5, 1, inner))
        self.of_gate = nn.Parameter(torch.linspace(0.01, 0.02, inner))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        hidden = self.up(self.table(ids))
        gate = torch.sigmoid(hidden * (self.of_gate * self.gain).square())
        return self.head(self.down(torch.tanh(hidden * (self.of_up * self.rooted)) * gate))


def test_a_number_beside_a_gain_may_be_of_the_width_that_its_product_sums() -> None:
    doll, error = small_class.moved(lambda width: Gains(Shape(width)), WIDTH, SMALL)
    assert error < 1e-12
    assert len(doll.plan.scalars) == 2
