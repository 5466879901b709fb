"""A slice that torch takes apart (torch.export, fx.Interpreter) is called as it always is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import matryoshkafy as mk


class Structured(nn.Module):
    """Takes a dict, a constant and keywords, returns a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(
        self,
        batch: dict[str, Tensor],
        scale: float = 2.0,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> dict[str, Any]:
        hidden = torch.relu(self.up(batch["x"])) * scale
        if mask is not None:
            hidden = hidden * mask[..., None]
        if bias is not None:
            hidden = hidden + bias[..., None]
        return {"y": self.down(hidden), "more": (hidden.sum(),)}


BATCH = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}
MASK, BIAS = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 2.0, 4.0])
CALLS = [
    ((BATCH,), {}),
    ((BATCH,), {"mask": MASK}),
    ((BATCH,), {"mask": MASK, "bias": BIAS}),
    ((BATCH, 3.0), {"bias": BIAS}),
    ((BATCH, 3.0), {"bias": BIAS, "mask": MASK}),
]


def sliced(args: Any, kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    doll = mk.convert(Structured().eval(), args, kwargs=kwargs, sizes=[4, 8, 16], nesting="sliced")
    return mk.slice(doll, 8)


def expected(small: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The formula of the class over the slice's own weights."""
    plain = Structured()
    plain.up, plain.down = nn.Linear(8, 8), nn.Linear(8, 4)
    plain.load_state_dict(small.state_dict())
    return plain(*args, **kwargs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_a_program_of_a_slice_returns_the_structure_of_the_model(
    args: Any, kwargs: Any, strict: bool
) -> None:
    small = sliced(args, kwargs)
    program = torch.export.export(small, args, kwargs, strict=strict)
    torch.testing.assert_close(program.module()(*args, **kwargs), expected(small, *args, **kwargs))


@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_an_interpreter_runs_a_slice(args: Any, kwargs: Any) -> None:
    small: Any = sliced(args, kwargs)
    found = fx.Interpreter(small).run(*args, *kwargs.values())
    torch.testing.assert_close(found, expected(small, *args, **kwargs))


def test_a_slice_says_what_it_takes() -> None:
    made = {(args[1:], *kwargs): sliced(args, kwargs) for args, kwargs in CALLS}
    assert {call: str(inspect.signature(small.forward)) for call, small in made.items()} == {
        ((),): "(batch, scale=None)",
        ((), "mask"): "(batch, scale=None, *, mask)",
        ((), "mask", "bias"): "(batch, scale=None, *, mask, bias)",
        ((3.0,), "bias"): "(batch, scale=3.0, *, bias)",
        ((3.0,), "bias", "mask"): "(batch, scale=3.0, *, bias, mask)",
    }


class Selfish(nn.Linear):
    """Calls its input self."""

    def forward(this, self: Tensor) -> Tensor:  # pyright: ignore[reportSelfClsParameterName]
        return nn.functional.linear(self, this.weight, this.bias)


def test_an_argument_may_be_called_self() -> None:
    model = nn.Sequential(Selfish(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    alone = mk.convert(Selfish(8, 16).eval(), (BATCH["x"],), sizes=[4, 8, 16], scope="output")
    assert str(inspect.signature(mk.slice(alone, 8).forward)) == "(self)"
    small = mk.slice(mk.convert(model, (BATCH["x"],), sizes=[4, 8, 16]), 8)
    assert str(inspect.signature(small.forward)) == "(input)"


class ByName(nn.Module):
    """Takes whatever it is given, as many wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(batch["x"]))) * batch["class"]


def test_a_name_that_no_signature_can_hold_is_taken_still() -> None:
    batch = {"x": BATCH["x"], "class": torch.ones(3, 1)}
    small = mk.slice(mk.convert(ByName().eval(), kwargs=batch, sizes=[4, 8, 16]), 8)
    assert str(inspect.signature(small.forward)) == "(*, x, **kwargs)"
    assert small(**batch).shape == (3, 4)  # torch.export takes no such name


class Positions(nn.Module):
    """Knows histories of five alone."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(10, 16), nn.Parameter(torch.randn(5, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.items(ids) + self.places).mean(1))


def test_what_a_slice_is_right_for_goes_with_its_program() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    ids = torch.randint(10, (3, 5))
    small = mk.slice(mk.convert(Positions().eval(), (ids,), sizes=[4, 8, 16]), 8)
    program = torch.export.export(small, (ids,), dynamic_shapes=({0: batch},))
    more = torch.randint(10, (7, 5))
    torch.testing.assert_close(program.module()(more), small(more))
    with pytest.raises(Exception, match="specialized it to be a constant"):
        torch.export.export(small, (ids,), dynamic_shapes=({0: batch, 1: length},))
