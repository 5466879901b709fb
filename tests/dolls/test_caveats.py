"""A model whose path was chosen by values of the example, and is not checked, says so once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.caveats import RecordedPathWarning
from matryoshkafy.dolls.doll import trace_of
from matryoshkafy.graph.paths import CHECKED


class Chosen(nn.Module):
    """Another path for inputs of another sign."""

    def __init__(self, branches: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4] -> [N, 3]"""
        h = self.first(x)
        if self.branches and x.sum() > 0:
            h = 2 * h
        return self.last(h)


def said(call: Callable[[Tensor], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(torch.ones(3, 4))
        call(torch.ones(3, 4))
    return [str(w.message) for w in caught if issubclass(w.category, RecordedPathWarning)]


def doll_of(model: nn.Module) -> mk.Doll:
    return mk.convert(model, (torch.ones(3, 4),), sizes=[4, 8])


def unchecked() -> mk.Doll:
    """A doll as older files hold them, or whose reads no check covers."""
    doll = doll_of(Chosen())
    remarks = tuple(r.replace(f", and {CHECKED}", "") for r in doll.plan.remarks)
    assert remarks != doll.plan.remarks
    return mk.Doll(trace_of(doll), replace(doll.plan, remarks=remarks))


def test_doll_outputs_slice_copy_and_file_say_it_once(tmp_path: Path) -> None:
    doll = unchecked()
    small = mk.slice(doll, 4)
    path = mk.save(doll, tmp_path / "doll")
    calls = (doll, unchecked().outputs, small, copy.deepcopy(small), mk.load(path, size=4))
    for call in calls:
        (text,) = said(call)
        assert "test_caveats.py:" in text and "was recorded" in text
    assert not said(doll.outputs)


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_functional_derivatives_are_right_or_refused_by_name(nesting: str) -> None:
    model, x = Chosen(branches=False), torch.ones(3, 4)
    doll = mk.convert(model, (x,), sizes=[4, 8], nesting=nesting)

    def slopes(module: nn.Module) -> dict[str, Tensor]:
        def total(state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, state, (x,)).sum()

        return torch.func.grad(total)(dict(module.named_parameters()))

    if nesting == "masked":
        with pytest.raises(mk.MatryoshkafyError, match=r"torch\.func was asked to differentiate"):
            slopes(doll)
        assert torch.equal(torch.vmap(lambda row: doll(row[None])[0])(x), doll(x))
    for each in (doll, model) if nesting == "sliced" else (mk.slice(doll, 8), model):
        expected = torch.autograd.grad(each(x).sum(), list(each.parameters()))
        for found, wanted in zip(slopes(each).values(), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_model_of_one_path_says_nothing() -> None:
    doll = doll_of(Chosen(branches=False))
    assert not said(doll) and not said(mk.slice(doll, 4))
