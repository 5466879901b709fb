"""torch.tensor_split and its kin: every remainder of a length is the model's, and widths nest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.guards import GuardError

Body = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A layer, a body that splits what it gives, a layer."""

    def __init__(self, body: Body, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, width).double(), nn.LazyLinear(5).double()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 3] -> [N, L, 5]"""
        return self.last(torch.tanh(self.body(self.first(x))))


def example(batch: int = 2, length: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 3, generator=draw, dtype=torch.float64)


def model_of(body: Body, width: int = 16) -> nn.Module:
    model = Between(body, width)
    model(example(length=6))  # the last layer learns its width
    return model.eval()


def turned(pieces: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(pieces[::-1], 1)


def written(x: Tensor) -> Tensor:
    y = x + 0
    y.tensor_split(3, 1)[1].mul_(2)
    torch.hsplit(y, [1, 3])[1].add_(1)
    return y


LENGTHS = {
    "in two": lambda x: turned(torch.tensor_split(x, 2, 1)),
    "in three": lambda x: turned(x.tensor_split(sections=3, dim=-2)),
    "at places": lambda x: turned(torch.tensor_split(x, [1, 3], 1)),
    "hsplit at places": lambda x: turned(torch.hsplit(x, (1, 3))),
    "written": written,
}


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize("body", LENGTHS.values(), ids=LENGTHS)
def test_no_remainder_is_the_examples(body: Body, nesting: str) -> None:
    model = model_of(body)
    doll = mk.convert(model, (example(),), sizes=[8, 16], nesting=nesting).eval()
    assert doll.plan.width == 16
    for shape in ((3, 5), (2, 6), (4, 7), (2, 8), (2, 9)):
        x = example(*shape)
        if nesting == "sliced":
            torch.testing.assert_close(doll(x), model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(doll.outputs(x)[8], mk.slice(doll, 8)(x), rtol=1e-9, atol=1e-9)


def test_what_must_divide_evenly_still_must() -> None:
    model = model_of(lambda x: turned(torch.hsplit(x, 3)))
    doll = mk.convert(model, (example(length=6),), sizes=[8, 16], nesting="sliced").eval()
    torch.testing.assert_close(doll(example(3, 9)), model(example(3, 9)), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError):
        model(example(2, 7))
    with pytest.raises(GuardError, match="dimension 1"):
        doll(example(2, 7))


def test_what_torch_refuses_is_refused_as_torch_does() -> None:
    with pytest.raises(TraceError, match="hsplit attempted to split"):
        mk.convert(Between(lambda x: turned(torch.hsplit(x, 3))), (example(),), sizes=[8, 16])


def product(pieces: tuple[Tensor, ...]) -> Tensor:
    return math.prod(pieces[1:], start=pieces[0])


WIDTHS = {
    "dsplit": lambda x: product(torch.dsplit(x, 2)),
    "dsplit at places": lambda x: product(x.dsplit([x.shape[-1] // 2])),
    "hsplit": lambda x: product(torch.hsplit(x.flatten(0, 1), 2)).unflatten(0, x.shape[:2]),
    "vsplit": lambda x: product(x.movedim(-1, 0).vsplit(4)).movedim(0, -1),
    "tensor_split": lambda x: product(torch.tensor_split(x, 4, -1)),
}


@pytest.mark.parametrize("body", WIDTHS.values(), ids=WIDTHS)
def test_pieces_of_a_width_are_those_of_the_narrow_class(body: Body) -> None:
    model = model_of(body)
    width = model.last.in_features
    doll = mk.convert(model, (example(),), sizes=[width // 2, width], nesting="sliced").eval()
    small, narrow = mk.slice(doll, width // 2), model_of(body, 8)
    narrow.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(example(3, 7)), narrow(example(3, 7)), rtol=1e-12, atol=1e-12)
    masked = mk.convert(model, (example(),), sizes=[width // 2, width], nesting="masked")
    assert mk.verify(masked, (example(3, 7),)).passed
