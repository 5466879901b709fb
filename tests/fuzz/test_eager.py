"""Eager models under the judge: some blocks at once, every block where there is time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fuzz.blocks import BLOCKS, KINDS
from tests.fuzz.eager import NESTINGS, Ledger, Recipe, alone, entry_of, recipe_of
from tests.zoo.judge import Verdict, judge, run

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


def test_a_ledger_goes_on_where_its_lines_end(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    first, second = Ledger(file), Ledger(file)
    first.note(1, 0, Verdict("a", "fuzz", "sliced"))
    second.note(1, 1, Verdict("b", "fuzz", "masked", "wrong", {"native": "wrong: 1e-2"}))
    again = Ledger(file)
    assert again.counts(1) == {"right": 1, "wrong": 1} and not again.counts(2)
    assert set(again.known) == {(1, 0), (1, 1)}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_some_blocks_alone(name: str, nesting: str) -> None:
    verdict = alone(name, nesting)
    assert verdict.status == "right", verdict.checks


def every_block() -> list[object]:
    """Return every block in both nestings."""
    pairs = itertools.product(BLOCKS, NESTINGS)
    return [pytest.param(name, nesting, id=f"{name}-{nesting}") for name, nesting in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nesting"), every_block())
@pytest.mark.filterwarnings("ignore")
def test_every_block_alone(name: str, nesting: str) -> None:
    verdict = alone(name, nesting)
    assert verdict.status in ("right", "refused"), verdict.checks


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
@pytest.mark.filterwarnings("ignore")
def test_random_eager_models(number: int) -> None:
    recipe, nesting = recipe_of(1, number)
    verdict = judge(entry_of(recipe), nesting)
    assert verdict.status in ("right", "refused"), verdict.checks
