"""An example of one row: a path that one row alone takes is traced as it is; what cannot be says
what to do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.guards import GuardError

Body = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """Two layers with a body between them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 16).double(), nn.Linear(16, 5).double()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 3] -> [N, L, 5]"""
        return self.last(torch.tanh(self.body(self.first(x))))


def example(batch: int = 1, length: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 3, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_a_branch_that_one_row_takes_is_traced_as_it_is(nesting: str) -> None:
    model = Between(lambda h: h if h.shape[0] == 1 else h * 2).eval()
    doll = mk.convert(model, (example(),), sizes=[8, 16], nesting=nesting).eval()
    x = example(1, 7)
    if nesting == "sliced":
        torch.testing.assert_close(doll(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(doll.outputs(x)[8], mk.slice(doll, 8)(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(GuardError, match="dimension 0"):
        doll(example(2))


ANY: Body = lambda h: h.squeeze()  # noqa: E731  what a call has one of
ROWS: Body = lambda h: h.squeeze(0)  # noqa: E731
NONE: Body = lambda h: h.unsqueeze(1).squeeze(1)  # noqa: E731


@pytest.mark.parametrize("body", [ANY, ROWS])
def test_a_squeeze_of_the_rows_says_what_to_do(body: Body) -> None:
    with pytest.raises(PlanError, match=r"squeeze\(\) at .*test_one_row.py.* two rows"):
        mk.convert(Between(body).eval(), (example(),), sizes=[4, 8, 16], nesting="masked")


@pytest.mark.parametrize(("body", "rows"), [(ANY, 2), (ROWS, 2), (NONE, 1)])
def test_what_a_refused_squeeze_asks_for_helps(body: Body, rows: int) -> None:
    doll = mk.convert(Between(body), (example(rows),), sizes=[4, 8, 16], nesting="masked").eval()
    outputs = doll.outputs(example(rows, 7))
    for size in (4, 8, 16):
        small = mk.slice(doll, size)(example(rows, 7))
        torch.testing.assert_close(outputs[size], small, rtol=1e-9, atol=1e-9)
