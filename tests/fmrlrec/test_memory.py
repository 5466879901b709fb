"""Counts against the built model and against the figures of the paper."""

from __future__ import annotations

import pytest

from examples.fmrlrec.config import Config
from examples.fmrlrec.model import Recommender, Shape
from tests.benchmarks import fmrlrec_memory as memory


@pytest.mark.parametrize("width", [8, 24])
def test_counts_are_those_of_the_model(width: int) -> None:
    blocks = Recommender(Shape(items=3, width=width)).blocks
    counted = sum(p.numel() for p in blocks.parameters())
    assert memory.block_parameters(width, Config()) == counted


def test_the_papers_savings_follow_from_the_formula() -> None:
    found = memory.savings(lambda m: m**2 + 1.65 * m, tuple(memory.PAPER))
    assert {m: round(value, 2) for m, value in found.items()} == memory.PAPER


def test_squares_save_a_third_in_the_limit() -> None:
    sizes = [2**k for k in range(20)]
    assert memory.savings(lambda m: m**2, sizes)[sizes[-1]] == pytest.approx(100 / 3)
