"""Width-derived constants are found, and rewritten to what the smaller class would have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk

Scale = float | Tensor


class Scaled(nn.Module):
    """An embedding times a constant of the width, as a number or as a buffer."""

    def __init__(self, width: int, power: float, *, kind: str = "number") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, width), nn.Linear(width, 5)
        self.number, self.kind = width**power, kind
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        self.register_buffer("scale", torch.tensor(self.number, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 5]"""
        x = self.table(ids)
        return self.head(x * (self.number if self.kind == "number" else self.scale.type(x.dtype)))


class Heads(nn.Module):
    """Attention of four heads that divides by the root of the whole width, not of a head."""

    def __init__(self, width: int, *, before: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.first, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        self.before, self.scale = before, width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 3] -> [N, T, 5]"""
        x = self.first(x)
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q * self.scale) @ k.mT if self.before else (q @ k.mT) * self.scale
        return self.head(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def assert_is_the_smaller_class(model: nn.Module, small: nn.Module, x: Tensor) -> None:
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert len(doll.plan.scalars) == 1
    cut = mk.slice(doll, doll.sizes[0])
    small.load_state_dict(cut.state_dict())
    torch.testing.assert_close(cut(x), small(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["number", "float32", "bfloat16"])
@pytest.mark.parametrize("power", [0.5, -0.5, 1.0, -1.0])
def test_a_power_of_the_width(power: float, kind: str) -> None:
    ids = torch.randint(0, 11, (2, 3), generator=torch.Generator().manual_seed(0))
    # 64 and 16 have exact roots, so bfloat16 holds the constants of both without rounding.
    doll = mk.convert(Scaled(64, power, kind=kind), (ids,), sizes=[16, 64], nesting="sliced")
    cut, small = mk.slice(doll, 16), Scaled(16, power, kind=kind)
    small.load_state_dict(cut.state_dict())
    torch.testing.assert_close(cut(ids), small(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", [True, False], ids=["queries", "scores"])
def test_the_root_of_the_width_that_holds_the_heads(before: bool) -> None:
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert_is_the_smaller_class(Heads(16, before=before), Heads(8, before=before), x)


class OneHead(Heads):
    """Attention of one head, scores divided by the root of the width that they were summed over."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 3] -> [N, T, 5]"""
        x = self.first(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        return self.head(self.out(scores.softmax(-1) @ v) - mean)


def test_the_root_of_the_width_that_a_product_was_summed_over() -> None:
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    model = OneHead(16, before=False)
    doll = mk.convert(model, (x,), sizes=[8, 16], nesting="sliced")
    assert [s.power for s in doll.plan.scalars] == [0.5, 1.0]
    small, native = mk.slice(doll, 8), OneHead(8, before=False)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(x), native(x), rtol=1e-5, atol=1e-6)


class HeldHeads(nn.Module):
    """Attention whose four heads are looked up by number: they stay, and each gets narrower."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.first, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        self.how, self.dim = how, width // 4
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))

    def heads(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, 4, T, D / 4]"""
        return x.unflatten(-1, (4, self.dim)).transpose(1, 2)[:, self.order]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 3] -> [N, T, 5]"""
        x, root = self.first(x), self.dim**0.5
        q, k = self.q(x), self.k(x)
        if self.how == "projected":
            q = q / root
        elif self.how == "both":
            q, k = q * self.dim**-0.25, k * self.dim**-0.25
        q, k, v = self.heads(q), self.heads(k), self.heads(self.v(x))
        return self.head(self.out(self.mixed(q, k, v, root).transpose(1, 2).flatten(2)))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, root: float) -> Tensor:
        """The attention, scaled in one of the ways that people write."""
        if self.how == "attention":
            return nn.functional.scaled_dot_product_attention(q, k, v, scale=1 / root)
        if self.how == "alpha":
            flat = [t.flatten(0, 1) for t in (q, k)]
            zeros = q.new_zeros(flat[0].shape[0], q.shape[2], q.shape[2])
            scores = torch.baddbmm(zeros, flat[0], flat[1].mT, beta=0, alpha=1 / root)
            return scores.view(*q.shape[:3], -1).softmax(-1) @ v
        scores = torch.einsum("nhid,nhjd->nhij", q, k) if self.how == "einsum" else q @ k.mT
        if self.how == "masked":
            scores = scores + torch.ones_like(scores[0, 0]).tril().log()
        scores = scores / root if self.how in ("scores", "einsum", "masked") else scores
        return scores.softmax(-1) @ v


HOW = ["projected", "both", "attention", "alpha", "scores", "einsum", "masked"]


@pytest.mark.parametrize("how", HOW)
def test_the_root_of_a_head_that_shrinks(how: str) -> None:
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    # heads of 24, so that no other constant is a root of the width by chance
    doll = mk.convert(HeldHeads(96, how), (x,), sizes=[48, 96], nesting="sliced")
    small, native = mk.slice(doll, 48), HeldHeads(48, how)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(x), native(x), rtol=1e-5, atol=1e-6)
    assert len(doll.plan.scalars) == (2 if how == "both" else 1)


class MeanProducts(nn.Module):
    """Pairs of tokens by the mean of their products, divided by a size or by 16 as written."""

    def __init__(self, width: int, *, counted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mix = nn.Linear(3, width), nn.Linear(6, width)
        self.head, self.counted = nn.Linear(width, 5), counted

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4, 3] -> [N, 4, 5]"""
        x = self.first(x)
        i, j = torch.triu_indices(4, 4, 1)
        pairs = (x @ x.mT)[:, i, j]
        if self.counted:
            return self.head(x + self.mix(pairs / x.shape[-1]).unsqueeze(1))
        return self.head(x + self.mix(pairs / 16).unsqueeze(1))


@pytest.mark.parametrize("counted", [True, False])
def test_a_mean_of_products_divides_by_the_size(counted: bool) -> None:
    x = torch.randn(2, 4, 3)
    model = MeanProducts(16, counted=counted)
    doll = mk.convert(model, (x,), sizes=[8, 16], nesting="sliced")
    small, native = mk.slice(doll, 8), MeanProducts(8, counted=counted)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(x), native(x), rtol=1e-5, atol=1e-6)


class Written(nn.Module):
    """A scale of 0.25 beside one of 16 ** -0.5, which is the same number."""

    def __init__(self, width: int, *, computed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.computed = nn.Linear(3, width), nn.Linear(width, 5), computed

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        x = self.first(x).tanh()
        if self.computed:
            return self.head(x * x.shape[-1] ** -0.5)
        return self.head(x * 0.25)


@pytest.mark.parametrize("computed", [True, False])
def test_a_number_that_the_line_holds_is_no_root(computed: bool) -> None:
    x = torch.randn(4, 3)
    model = Written(16, computed=computed)
    doll = mk.convert(model, (x,), sizes=[4, 16], nesting="sliced", check=False)
    assert len(doll.plan.scalars) == computed
    small, native = mk.slice(doll, 4), Written(4, computed=computed)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(x), native(x))


QUARTER = 1 / 4


class Named(nn.Module):
    """Steps of a quarter, under the names that people give them."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.kind = nn.Linear(3, width), nn.Linear(width, 5), kind
        self.step, self.root = 0.25, width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        x = self.first(x).tanh()
        half = 0.5
        if self.kind == "attribute":
            return self.head(x * self.step)
        if self.kind == "local":
            return self.head(half * half * x)
        if self.kind == "global":
            return self.head(x * QUARTER)
        return self.head(x * self.root)


@pytest.mark.parametrize("kind", ["attribute", "local", "global", "root"])
def test_a_number_under_a_name_is_no_root_unless_it_is_one(kind: str) -> None:
    doll = mk.convert(Named(16, kind), (torch.randn(4, 3),), sizes=[4, 16], nesting="sliced")
    assert [s.value for s in doll.plan.scalars] == [0.25] * (kind == "root")


def test_a_number_beside_a_power_of_something_else_is_no_root_of_the_model_s_width() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 5)
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            """x [N, 3] -> [N, 5]"""
            x = self.first(x)
            h = self.up(x).tanh()
            return self.last(x + self.down(h * 0.25 + h**2))

    plan = mk.inspect(Beside(), (torch.randn(4, 3),), sizes=[4, 16], nesting="sliced")
    assert plan.scalars == ()


def test_a_fourth_root_of_one_operand_is_a_number_like_any_other() -> None:
    class One(Scaled):
        def forward(self, ids: Tensor) -> Tensor:
            """ids [N, T] -> [N, T, 5]"""
            return self.head(self.table(ids) * 16**-0.25)

    plan = mk.inspect(One(16, 0.5), (torch.zeros(2, 3, dtype=torch.long),), nesting="sliced")
    assert not plan.scalars


def test_a_constant_rounded_to_bfloat16_is_still_found() -> None:
    ids = torch.randint(0, 11, (2, 3))
    plan = mk.inspect(Scaled(40, 0.5, kind="bfloat16"), (ids,), nesting="sliced")
    (scalar,) = plan.scalars
    assert scalar.value != math.sqrt(40) and scalar.power == 0.5
    assert scalar.at(10) == pytest.approx(math.sqrt(10), rel=2**-8)


def test_the_root_of_a_head_stays() -> None:
    class Usual(Heads):
        def __init__(self) -> None:
            super().__init__(16, before=False)
            self.scale = 4**-0.5

    plan = mk.inspect(Usual(), (torch.randn(2, 3, 3),), nesting="sliced")
    assert not plan.scalars


def test_masked_nesting_keeps_every_constant() -> None:
    plan = mk.inspect(Scaled(16, 0.5), (torch.zeros(2, 3, dtype=torch.long),), nesting="masked")
    assert not plan.scalars


@pytest.mark.parametrize("pattern", ["scalar:mul", "scalar:*", "scalar:test_scalars.py:*"])
def test_a_kept_constant_stays_and_the_width_nests(pattern: str) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    doll = mk.convert(Scaled(16, 0.5), (ids,), sizes=[0.25, 1.0], nesting="sliced", keep=[pattern])
    assert doll.sizes == [4, 16]
    assert not doll.plan.scalars
    cut = mk.slice(doll, 4)
    state = cut.state_dict()
    expected = (4 * state["table.weight"][ids]) @ state["head.weight"].mT + state["head.bias"]
    torch.testing.assert_close(cut(ids), expected)


def test_a_pattern_without_a_constant_lists_them() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(mk.MatryoshkafyError, match=r"scalar:add.*\['scalar:test_scalars.py:\d+'\]"):
        mk.inspect(Scaled(16, 0.5), (ids,), nesting="sliced", keep=["scalar:add"])


class Counted(nn.Module):
    """Integers that count a width, the width less one, or the rounds of a loop."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.kind = nn.Linear(3, width), nn.Linear(width, 5), kind

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        x = self.first(x).tanh()
        units = x.shape[-1]
        if self.kind == "unbiased":
            centred = x - x.sum(-1, keepdim=True) / units
            x = centred / (centred.square().sum(-1, keepdim=True) / (units - 1)).sqrt()
        if self.kind == "loop":
            x = sum(x.sin() * i for i in range(1, 17))
        return self.head(x)


@pytest.mark.parametrize("kind", ["unbiased", "loop"])
def test_an_integer_counts_a_width_or_it_is_a_number(kind: str) -> None:
    x, model = torch.randn(4, 3), Counted(16, kind)
    doll = mk.convert(model, (x,), sizes=[8, 16], nesting="sliced")
    small, native = mk.slice(doll, 8), Counted(8, kind)
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(x), native(x), rtol=1e-5, atol=1e-6)
    assert len(doll.plan.scalars) == (2 if kind == "unbiased" else 0)


ROOTS: dict[str, Callable[[int], Tensor]] = {
    "sqrt": lambda width: torch.sqrt(torch.tensor(float(width))),
    "whole": lambda width: torch.sqrt(torch.tensor(width)),
    "method": lambda width: torch.tensor([float(width)]).sqrt(),
    "rsqrt": lambda width: 1 / torch.rsqrt(torch.tensor(float(width))),
    "power": lambda width: torch.tensor(float(width)) ** 0.5,
}


class Rooted(nn.Module):
    """A root that the graph takes itself, of a tensor that holds the width."""

    def __init__(self, width: int, root: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        self.width, self.root = width, root

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        return self.head(self.first(x) / ROOTS[self.root](self.width))


@pytest.mark.parametrize("root", list(ROOTS))
def test_a_root_that_the_graph_takes_follows_the_width(root: str) -> None:
    model, x = Rooted(16, root).eval(), torch.randn(4, 3)
    doll = mk.convert(model, x, sizes=[4, 16], nesting="sliced")
    small = mk.slice(doll, 4)
    native = Rooted(4, root).eval()
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(doll(x), model(x))
    torch.testing.assert_close(small(x), native(x))
