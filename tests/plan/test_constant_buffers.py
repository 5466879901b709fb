"""A buffer that holds a constant of the width has, in a sub-model, the constant of its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.errors import PlanError
from matryoshkafy.plan.plan import plan_from_dict, plan_to_dict

KINDS: dict[str, tuple[Callable[[int], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "root": (lambda width: torch.tensor(width**0.5), lambda x, c: x * c),
    "one element": (lambda width: torch.tensor([width**-0.5]), lambda x, c: x * c),
    "divides": (lambda width: torch.tensor(width**0.5), lambda x, c: x / c),
    "bfloat16": (
        lambda width: torch.tensor(width**0.5, dtype=torch.bfloat16),
        lambda x, c: x * c.type(x.dtype),
    ),
    "width": (lambda width: torch.tensor(float(width)), lambda x, c: x / torch.sqrt(c)),
    "integer": (lambda width: torch.tensor(width), lambda x, c: x / torch.sqrt(c)),
    "reciprocal": (lambda width: torch.tensor(1.0 / width), lambda x, c: x * torch.sqrt(c)),
    "twice": (lambda width: torch.tensor(width**0.5), lambda x, c: x.relu() * c + x / c),
}


class Held(nn.Module):
    """A layer times a constant that stands in a buffer."""

    constant: Tensor

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        make, self.use = KINDS[kind]
        self.register_buffer("constant", make(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        return self.head(self.use(self.first(x), self.constant))


class Both(Held):
    """The constant is an output as well, where it is whatever the model has at full width."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, 3] -> [N, 5] and the constant"""
        return super().forward(x), self.constant * 1


def converted(kind: str) -> tuple[Doll, Tensor]:
    """Return a doll of sizes 4, 8 and 16, and an input."""
    x = torch.randn(4, 3)
    return mk.convert(Held(16, kind).eval(), x, sizes=[4, 8, 16], nesting="sliced"), x


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_small_class_loads_every_tensor_and_computes_the_same(kind: str) -> None:
    doll, x = converted(kind)
    for size in (4, 8, 16):
        small, native, fresh = mk.slice(doll, size), Held(size, kind).eval(), Held(size, kind)
        native.load_state_dict(small.state_dict())
        torch.testing.assert_close(native.constant, fresh.constant)
        # The graph multiplies by the root itself, the class by what its buffer's type holds of it.
        rtol = float(torch.finfo(torch.bfloat16).eps) if kind == "bfloat16" else 1e-6
        torch.testing.assert_close(small(x), native(x), rtol=rtol, atol=1e-6)
    again = mk.slice(mk.slice(doll, 8), 4)
    torch.testing.assert_close(again.state_dict()["constant"], Held(4, kind).constant)


@pytest.mark.parametrize("packed", [False, True])
def test_from_files_too(packed: bool, tmp_path: Path) -> None:
    doll, x = converted("width")
    write = mk.pack if packed else mk.save
    folder = write(doll, tmp_path / "doll")
    small = mk.load(folder, size=4)
    assert isinstance(small, fx.GraphModule)
    assert small.state_dict()["constant"] == 4
    assert mk.load(folder).state_dict()["constant"] == 16
    torch.testing.assert_close(small(x), mk.slice(doll, 4)(x))
    if packed:
        assert mk.upgrade(small, folder, 8).state_dict()["constant"] == 8
        assert mk.upgrade(small, folder, 16).state_dict()["constant"] == 16


def test_sizes_that_share_memory_have_their_own_constant() -> None:
    doll, _ = converted("root")
    constants = {n: m.state_dict()["constant"] for n, m in mk.slices(doll).items()}
    assert constants == {4: 2, 8: torch.tensor(8**0.5), 16: 4}


def test_a_constant_that_something_else_reads_stays() -> None:
    x = torch.randn(4, 3)
    doll = mk.convert(Both(16, "root").eval(), x, sizes=[4, 16], nesting="sliced")
    small = mk.slice(doll, 4)
    assert small.state_dict()["constant"] == 4
    assert small(x)[1] == 4


def test_a_kept_constant_stays() -> None:
    x = torch.randn(4, 3)
    keep = ["scalar:test_constant_buffers.py:*"]
    model = Held(16, "root").eval()
    doll = mk.convert(model, x, sizes=[4, 16], nesting="sliced", keep=keep)
    assert mk.slice(doll, 4).state_dict()["constant"] == 4


def test_a_plan_s_constant_of_no_group_is_refused() -> None:
    plan = converted("root")[0].plan
    stored = plan.stored["constant"]
    assert plan_from_dict(plan_to_dict(plan)) == plan
    assert stored.scalar is not None
    wrong = replace(stored, scalar=replace(stored.scalar, group=9))
    broken = replace(plan, stored={**plan.stored, "constant": wrong})
    with pytest.raises(PlanError, match="no number that follows a width"):
        plan_from_dict(plan_to_dict(broken))


class Broadcast(Held):
    """The constant goes through an op that gives several tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3] -> [N, 5]"""
        one, other = torch.broadcast_tensors(self.constant + 0, self.constant * 2)
        return self.head(self.first(x) * self.constant * one / other)


def test_a_constant_that_an_op_of_several_outputs_reads_stays() -> None:
    x = torch.randn(4, 3)
    model = Broadcast(16, "root").eval()
    doll = mk.convert(model, x, sizes=[4, 16], nesting="sliced")
    assert mk.slice(doll, 4).state_dict()["constant"] == 4
