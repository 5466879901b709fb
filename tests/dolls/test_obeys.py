"""Law 10: a plan that a graph does not obey is refused by op, size, line and remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op

import matryoshkafy as mk
from matryoshkafy.axes.dims import Nested
from matryoshkafy.dolls.obeys import check_sizes
from matryoshkafy.errors import PlanError
from matryoshkafy.rewrite.graphs import Graphs
from matryoshkafy.rules import Walk
from tests.rules.kept import rules_kept
from tests.small_models import MODELS, build


@custom_op("obeystest::widen", mutates_args=())
def widen(x: Tensor, width: int) -> Tensor:
    """x with its last dim repeated or cut to `width`."""
    return x.repeat_interleave(-(-width // x.shape[-1]), -1)[..., :width].clone()


@widen.register_fake
def _(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def same_axes(walk: Walk, node: object, args: dict[str, object]) -> object:
    return walk.of(args["x"])


class Widened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.ops.obeystest.widen(self.up(x), 8)))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_a_size_constant_that_a_row_conceals_is_refused_at_convert(nesting: str) -> None:
    x = torch.randn(4, 3)
    with rules_kept():
        mk.rule(torch.ops.obeystest.widen)(same_axes)
        with pytest.raises(PlanError) as refusal:
            mk.convert(Widened(), (x,), sizes=[4, 8], nesting=nesting)
    text = str(refusal.value)
    assert "at size 4, obeystest::widen" in text and "test_obeys.py:" in text
    assert "has the shape [4, 8], the plan says [4, 4]" in text and "sizes=" in text
    with rules_kept():
        mk.rule(torch.ops.obeystest.widen, sizes="width")(same_axes)
        doll = mk.convert(Widened(), (x,), sizes=[4, 8], nesting=nesting)
        assert mk.slice(doll, 4)(x).shape == (4, 2)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_every_node_is_compared(name: str, nesting: str) -> None:
    """A plan with one node of another size is seen, whichever node it is."""
    model, inputs = build(name)
    doll = mk.convert(model, inputs, sizes=[4, 8, 16], nesting=nesting)
    trace, plan = doll._trace, doll.plan
    nested = [
        n.name
        for n in trace.graph.nodes
        if n.op == "call_function" and n.name not in plan.full and _nests(plan.dims(n.name))
    ]
    assert nested
    for wrong in (nested[0], nested[len(nested) // 2], nested[-1]):
        shape = tuple((3, *dim) if _nests((dim,)) else dim for dim in plan.dims(wrong))
        with pytest.raises(PlanError, match="the plan says"):
            check_sizes(Graphs(trace, replace(plan, nodes={**plan.nodes, wrong: (shape,)})))


def _nests(shape: object) -> bool:
    return isinstance(shape, tuple) and any(
        isinstance(factor, Nested) for dim in shape for factor in dim
    )


def test_what_fails_at_a_size_is_said_by_node() -> None:
    model, inputs = build(next(iter(MODELS)))
    doll = mk.convert(model, inputs, sizes=[4, 8, 16], nesting="sliced")
    name = next(iter(doll.plan.stored))
    kept = doll.plan.stored[name]
    wrong = replace(kept, dims=tuple((16,) for _ in kept.dims))
    plan = replace(doll.plan, stored={**doll.plan.stored, name: wrong})
    with pytest.raises(PlanError, match="at size"):
        check_sizes(Graphs(doll._trace, plan))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.head(torch.relu(self.mix(y + torch.randn(y.shape))))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_noise_is_drawn_at_the_width_of_the_slice(nesting: str) -> None:
    x = torch.randn(4, 3)
    doll = mk.convert(Noisy(), (x,), sizes=[4, 8], nesting=nesting)
    small = mk.slice(doll, 4)
    (noise,) = (n for n in small.graph.nodes if "randn" in str(n.target))
    assert noise.args[0] == [4, 4] or list(noise.args[0])[-1] == 4
    assert small(x).shape == (4, 2)
