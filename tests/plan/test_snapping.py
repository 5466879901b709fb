"""multiple_of: widths that hardware and configurations can express."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import matryoshkafy as mk


class Heads(nn.Module):
    """Six heads of eight units, whose widths are odd at a third: 16 of 48 is two heads."""

    def __init__(self, width: int = 48, heads: int = 6, hidden: int = 100) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h + self.down(torch.relu(self.up(h))))


IDS = (torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0)),)


def widths(plan: mk.Plan, name: str) -> list[int]:
    (index,) = [i for i, group in enumerate(plan.groups) if name in group.name]
    return [w[index] for w in plan.ladder]


def test_every_width_is_a_multiple_or_whole() -> None:
    plan = mk.inspect(Heads(), IDS, sizes=[10, 21, 48], nesting="sliced", multiple_of=16)
    assert plan.sizes == (16, 32, 48)
    assert widths(plan, "up.out") == [32, 48, 100]
    # A head spans eight: two of them are the least multiple of sixteen.
    assert widths(plan, "attention") == [2, 4, 6]
    assert "sizes are multiples of 16: 10 became 16, 21 became 32" in plan.remarks


def test_a_hidden_layer_stays_the_multiple_of_its_width_that_it_was() -> None:
    plan = mk.inspect(Heads(hidden=192), IDS, sizes=[10, 18, 48], nesting="sliced", multiple_of=16)
    assert plan.sizes == (16, 32, 48)
    # Each alone would be rounded to 48 and 80, which no class with a ratio of four has.
    assert widths(plan, "up.out") == [64, 128, 192]


def test_sizes_that_become_equal_are_one() -> None:
    plan = mk.inspect(Heads(), IDS, sizes=[3, 10, 48], nesting="sliced", multiple_of=16)
    assert plan.sizes == (16, 48)
    assert len(plan.ladder) == 2


def test_a_multiple_above_the_width_leaves_the_model_whole() -> None:
    plan = mk.inspect(Heads(), IDS, sizes=[10, 48], nesting="sliced", multiple_of=64)
    assert plan.sizes == (48,)
    assert plan.ladder[-1] == tuple(group.size for group in plan.groups)


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_the_laws_hold_on_snapped_widths(nesting: str) -> None:
    torch.manual_seed(0)
    doll = mk.convert(Heads(), IDS, sizes=[10, 48], nesting=nesting, multiple_of=16)
    assert doll.sizes == [16, 48]
    assert mk.verify(doll, IDS).passed


@pytest.mark.parametrize("given", [0, -8, True, 2.0, "8"])
def test_what_is_no_positive_integer_is_refused(given: object) -> None:
    with pytest.raises(mk.MatryoshkafyError, match="multiple_of=.*positive integer"):
        mk.inspect(Heads(), IDS, sizes=[10, 48], nesting="sliced", multiple_of=given)  # type: ignore[arg-type]


def test_a_snapped_size_has_a_native_class() -> None:
    """Without whole heads there is no configuration: 20 is no multiple of a head's width."""
    import functools

    model = Heads(hidden=96).eval()
    like = functools.partial(Heads, width=48, heads=6, hidden=96)
    odd = mk.slice(mk.convert(model, IDS, sizes=[20, 48], nesting="sliced"), 20)
    with pytest.raises(mk.MatryoshkafyError, match="multiple_of"):
        mk.native(odd, like=like)
    even = mk.convert(model, IDS, sizes=[20, 48], nesting="sliced", multiple_of=8)
    assert mk.native(mk.slice(even, 24), like=like).attention.num_heads == 3
