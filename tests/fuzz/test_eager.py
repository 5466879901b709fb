"""Eager models under the judge: some blocks at once, every block where there is time."""

from __future__ import annotations

import pytest

from tests.fuzz.blocks import BLOCKS, KINDS
from tests.fuzz.eager import NESTINGS, Recipe, alone, entry_of
from tests.zoo.judge import run

QUICK = ("FeedForward", "write_select", "by_length", "names_escaped")


def test_every_block_runs_at_both_widths() -> None:
    for name in BLOCKS:
        entry = entry_of(Recipe("vectors", (name,), "pooled"))
        model, args, kwargs = entry.build()
        assert entry.rebuild is not None
        small = entry.rebuild(0.5)
        assert run(model, (args, kwargs)).shape == run(small, (args, kwargs)).shape == (3, 5), name


def test_the_kinds_are_wide() -> None:
    assert len(BLOCKS) >= 60
    assert len(KINDS) >= 8


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_some_blocks_alone(name: str, nesting: str) -> None:
    verdict = alone(name, nesting)
    assert verdict.status == "right", verdict.checks
