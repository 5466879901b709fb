"""What is counted stays whole: copies of a width, groups of a shuffle, slots, buckets, numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matryoshkafy as mk
from tests.fuzz.blocks import BLOCKS, Make
from tests.fuzz.odd import Maxout, Memory
from tests.zoo.registry import Scale

WIDTH, SMALL = 16, 8


class Buckets(nn.Module):
    """Every position adds to one of 6 rows, which an argmax or a largest value's number chooses."""

    def __init__(self, s: Scale, *, pair: bool = False) -> None:
        super().__init__()
        self.bucket, self.value = nn.Linear(s(WIDTH), 6), nn.Linear(s(WIDTH), s(6))
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor:
        scores = self.bucket(x)
        chosen = scores.max(-1).indices if self.pair else scores.argmax(-1)
        return x * (1 + 0.1 * chosen.unsqueeze(-1)) + self.value(x).amax(-1, keepdim=True)


class Net(nn.Module):
    """A layer, the block, a feed-forward net and a head."""

    def __init__(self, block: Make, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        s = Scale(width / WIDTH)
        self.first, self.block = nn.Linear(3, s(WIDTH)), block(s)
        self.hidden, self.head = nn.Linear(s(WIDTH), s(32)), nn.Linear(s(32), 5)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 3] -> [N, L, 5]"""
        return self.head(F.gelu(self.hidden(self.block(self.first(x)))))


class WrittenGroups(nn.Module):
    """A shuffle of 8 groups, more than there are units in each; how many units is left open."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.before, self.after = (nn.Linear(s(WIDTH), s(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        groups = self.before(x).view(*x.shape[:2], 8, -1)
        return self.after(groups.transpose(2, 3).reshape(*x.shape[:2], -1))


class Upsampled(nn.Module):
    """A layer writes two positions for each one, and nothing reads their units (SEW)."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.written = nn.Linear(s(WIDTH), 2 * s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        pairs = F.gelu(self.written(x)).view(x.shape[0], x.shape[1], 2, -1)
        return pairs.flatten(1, 2)


KINDS = ("Maxout", "Capsules", "LowRankWriter", "Shuffled", "Bilinear", "Kronecker",
         "SelectiveScan", "TokenMixer")  # fmt: skip
OWN: dict[str, Make] = {"Memory": Memory, "Buckets": Buckets, "WrittenGroups": WrittenGroups}
MADE: dict[str, Make] = {**OWN, **{k: BLOCKS[k] for k in KINDS}}


@pytest.mark.parametrize("name", MADE)
def test_the_slice_is_the_class_with_as_many_of_what_is_counted(name: str) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    model, native = (Net(MADE[name], w).double().eval() for w in (WIDTH, SMALL))
    small = mk.slice(
        mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced", check=False), 0.5
    )  # fmt: skip
    native.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(x), native(x), rtol=1e-9, atol=1e-11)


def test_positions_that_a_layer_writes_stay_as_many() -> None:
    x = torch.randn(2, 7, WIDTH)
    doll = mk.convert(Upsampled(Scale(1)), (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert mk.slice(doll, 0.5)(x).shape == (2, 14, WIDTH // 2)


@pytest.mark.parametrize("pair", [False, True])
def test_the_units_that_a_number_is_chosen_among_stay_whole(pair: bool) -> None:
    model = Net(lambda s: Buckets(s, pair=pair), WIDTH)
    plan = mk.inspect(model, (torch.randn(2, 7, 3),), nesting="sliced")
    whole = {w.axis: w.why for w in plan.whole}
    assert whole["block.bucket.weight:0"] == "indexed"
    assert "block.value.weight:0" not in whole  # its largest value alone is read


def test_copies_say_what_they_are_copies_of() -> None:
    plan = mk.inspect(Net(Maxout, WIDTH), (torch.randn(2, 7, 3),), nesting="sliced")
    assert ("copies", 3) in {(w.why, w.size) for w in plan.whole}


def test_whole_heads_shrink_still() -> None:
    """A product that one layer writes and another reads is heads times units of a head."""
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    body = nn.Sequential(nn.Linear(3, 16), model, nn.Linear(16, 5))
    plan = mk.inspect(body, (torch.randn(2, 7, 3),), nesting="sliced")
    assert 4 in {g.size for g in plan.groups} and plan.width == 16
