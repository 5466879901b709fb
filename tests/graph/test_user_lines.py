"""The line of a node is the innermost of the model's own, whatever the function is called."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, fx, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import trace_of
from matryoshkafy.graph.nodes import source_of

ANCHORS = getattr(fx.proxy, "_STACK_TRACE_ANCHORS", None)


def gated(h: Tensor) -> Tensor:
    """[.., D] -> [.., D]"""
    return h * h.sigmoid()


class Net(nn.Module):
    """A layer whose output goes through a method and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

    def hidden(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 16]"""
        return gated(self.first(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 2]"""
        return self.head(self.hidden(x))


@pytest.mark.skipif(ANCHORS is None, reason="this torch keeps the lines of forwards alone")
def test_a_node_stands_on_the_line_of_its_function_and_torch_is_left_as_it_was() -> None:
    before = set(ANCHORS or ())
    doll = mk.convert(Net(), (torch.randn(3, 8),), sizes=[4, 16])
    assert set(ANCHORS or ()) == before
    lines = {n.name: source_of(n) or "" for n in trace_of(doll).graph.nodes}
    first = inspect.getsourcelines(gated)[1]
    assert lines["sigmoid"].endswith(f"test_user_lines.py:{first + 2} (gated)")
    assert lines["relu"].endswith("(hidden)")
    assert lines["linear_1"].endswith("(forward)")
