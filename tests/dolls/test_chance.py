"""What is random in a forward: dropout that is always on, draws that are not torch's."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk

SIZES = [4, 8, 16]


class Net(nn.Module):
    """Two layers, and something random between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 6] -> [N, 3]"""
        return self.last(self.between(self, self.first(x).relu()))


ALWAYS_ON: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "dropout": lambda _, h: F.dropout(h, 0.3),
    "alpha": lambda _, h: F.alpha_dropout(h, 0.3, True),
    "both": lambda m, h: F.dropout(F.dropout(h, 0.3, m.training), 0.2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize("form", ALWAYS_ON)
def test_dropout_that_is_always_on_stays_on(form: str, nesting: mk.Nesting, training: bool) -> None:
    model, x = Net(ALWAYS_ON[form]).eval(), torch.randn(5, 6)
    doll = mk.convert(model, (x,), sizes=SIZES, nesting=nesting)
    model.train(training)
    doll.train(training)
    with torch.random.fork_rng():
        answers: list[Tensor] = []
        for each in (doll, model):
            torch.manual_seed(1)
            out = each(x)
            answers.append(out if isinstance(out, Tensor) else out[16])
        torch.testing.assert_close(*answers)
        part = mk.slice(doll, 8)
        torch.manual_seed(1)
        first = part(x)
        torch.manual_seed(2)
        assert not torch.equal(first, part(x))


@pytest.mark.parametrize("draw", [random.random, np.random.uniform])
def test_layers_dropped_by_chance_that_torch_does_not_draw_are_said(
    draw: Callable[[], float],
) -> None:
    def between(m: nn.Module, h: Tensor) -> Tensor:
        return h if m.training and draw() < 0.5 else h * 2

    doll = mk.convert(Net(between).eval(), (torch.randn(5, 6),), sizes=SIZES, nesting="sliced")
    said = [r for r in doll.plan.remarks if "Python or numpy for random numbers" in r]
    assert len(said) == 1


def test_hooks_of_parameters_are_said() -> None:
    model = Net(lambda _, h: h)
    model.first.weight.register_hook(lambda gradient: 10 * gradient)
    doll = mk.convert(model.eval(), (torch.randn(5, 6),), sizes=SIZES, nesting="sliced")
    said = [r for r in doll.plan.remarks if r.startswith("hooks: ")]
    assert len(said) == 1 and "first.weight" in said[0]
