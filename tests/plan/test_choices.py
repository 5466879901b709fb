"""What a softmax chooses among stays whole, and so do centres; a width behind one nests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from tests.fuzz import users
from tests.fuzz.blocks import Make
from tests.plan.test_counts import SMALL, WIDTH, Net
from tests.zoo.registry import Scale

KEPT = ("classes", "attended", "frozen table")
WHOLE: dict[str, tuple[Make, int]] = {
    "mixture": (users.Mixture, 5),
    "tags": (users.Tags, 6),
    "atoms": (users.atoms_by_sum, 7),
    "atoms by a product": (users.atoms_by_product, 7),
    "projected keys": (users.projected_plain, 3),
    "projected keys, fused": (users.projected_fused, 3),
    "cells": (users.Cells, 6),
    "centres": (users.Centres, 9),
    "clusters": (users.Clusters, 4),
    "frequencies": (users.RadialBasis, 6),
    "pooled": (users.Pooled, 3),
}
KINDS: dict[str, Make] = {name: make for name, (make, _) in WHOLE.items()} | {
    "feature maps": users.FeatureMaps,
    "ones": users.Ones,
    "modulated": users.Modulated,
    "equalised": users.Equalised,
    "steps": users.RungeKutta,
    "split heads": users.SplitHeads,
    "skipped": users.Skipped,
    "halves": users.Halves,
    "shortcut": users.ZeroShortcut,
    "fourth roots": users.FourthRoots,
    "gains": users.Gains,
    "spectra": users.Spectra,
    "deformed": users.Deformed,
    "members": users.Members,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_slice_is_the_smaller_class(kind: str) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    model, native = (Net(KINDS[kind], w).double().eval() for w in (WIDTH, SMALL))
    small = mk.slice(mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced", check=False), 0.5)
    native.load_state_dict(small.state_dict())
    for batch in (2, 5):
        x = torch.randn(batch, 7, 3, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(small(x), native(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize("kind", WHOLE)
def test_it_says_what_stays_whole(kind: str, nesting: str) -> None:
    make, size = WHOLE[kind]
    plan = mk.inspect(Net(make, WIDTH), (torch.randn(2, 7, 3),), nesting=nesting)  # type: ignore[arg-type]
    assert size in {w.size for w in plan.whole if w.why in KEPT}
    assert size not in {g.size for g in plan.groups}


def test_groups_across_values_are_told_and_demoted_where_one_pass_holds_all_sizes() -> None:
    model, x = Net(users.Skipped, WIDTH), (torch.randn(2, 7, 3),)
    sliced, masked = (mk.inspect(model, x, nesting=n) for n in ("sliced", "masked"))
    assert any(r.startswith("groups: those of group_norm") for r in sliced.remarks)
    assert not any(r.startswith("groups:") for r in masked.remarks)
    assert any(r.startswith("demoted") for r in masked.remarks)


class Widened(nn.Module):
    """The shortcut of zeros whose text says how many: 2 and 6 at every width."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        wide = s(WIDTH) + 8
        self.wide, self.back = nn.Linear(s(WIDTH), wide), nn.Linear(wide, s(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(torch.nn.functional.pad(x, (2, 6)) + self.wide(x).relu())


def test_zeros_that_the_text_counts_stay_as_many() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    model, native = (Net(Widened, w).double().eval() for w in (WIDTH, SMALL))
    small = mk.slice(mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced"), 0.5)
    native.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(x), native(x), rtol=1e-9, atol=1e-11)
