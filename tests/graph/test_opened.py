"""Masks of floats have the length of what they mask: it stays open where the model leaves it so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import matryoshkafy as mk
from matryoshkafy.graph.guards import GuardError
from matryoshkafy.graph.trace import trace

Shape = tuple[int, ...]


class Attention(nn.Module):
    """Four heads over x [B, L, 6], with a mask that is added to the scores."""

    def __init__(self, *, fused: bool = False, length: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.qkv, self.head = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3)
        self.fused = fused
        self.places = nn.Parameter(torch.randn(length, 16)) if length else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, 6], mask [.., L, L] -> [B, L, 3]"""
        h = self.first(x) if self.places is None else self.first(x) + self.places
        q, k, v = self.qkv(h).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = torch.softmax(q @ k.mT / 2 + mask, -1) @ v
        return self.head(out.transpose(1, 2).flatten(2))


def example(mask: Callable[[int, int], Shape], batch: int = 2, length: int = 5) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((batch, length, 6), mask(batch, length))
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


MASKS = {
    "one": lambda _, length: (length, length),
    "each": lambda batch, length: (batch, 1, length, length),
    "heads": lambda batch, length: (batch, 4, length, length),
}


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize("fused", [False, True], ids=["written", "fused"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_length_of_a_mask_is_open(
    mask: Callable[[int, int], Shape], fused: bool, nesting: str
) -> None:
    model = Attention(fused=fused).double().eval()
    doll = mk.convert(model, example(mask), sizes=[0.5, 1.0], nesting=nesting).eval()
    small = mk.slice(doll, 0.5)
    for batch, length in ((2, 5), (3, 7), (1, 4)):
        given = example(mask, batch, length)
        if nesting == "sliced":
            torch.testing.assert_close(doll(*given), model(*given), rtol=1e-12, atol=1e-12)
        outputs = doll.outputs(*given)
        torch.testing.assert_close(outputs[doll.sizes[0]], small(*given), rtol=1e-9, atol=1e-9)
    with pytest.raises(GuardError):
        doll(example(mask, 2, 6)[0], example(mask, 2, 5)[1])


def test_a_width_of_the_same_number_is_no_length() -> None:
    model, mask = Attention().double().eval(), MASKS["one"]
    found = trace(model, example(mask, length=6))  # the inputs have six features, too
    x, y = example(mask, 3, 4)
    computed = torch.fx.Interpreter(found.root, graph=found.graph).run(x, y)[0]
    torch.testing.assert_close(computed, model(x, y), rtol=1e-12, atol=1e-12)
    found.signature.guards.check([x, y])
    with pytest.raises(GuardError, match="dimension 2"):
        found.signature.guards.check([torch.ones(2, 4, 4), torch.ones(4, 4)])


def test_a_length_that_the_model_holds_is_held() -> None:
    model = Attention(length=5).double().eval()
    doll = mk.convert(model, example(MASKS["one"]), sizes=[0.5, 1.0], nesting="sliced").eval()
    given = example(MASKS["one"], 3)
    torch.testing.assert_close(doll(*given), model(*given), rtol=1e-12, atol=1e-12)
    with pytest.raises(GuardError, match="dimension 1"):
        doll(*example(MASKS["one"], 2, 7))
