"""Does it learn? A shorter form of tests/benchmarks/learning.py, on the same real digits."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from tests.benchmarks.learning import METHODS, TASKS, Accuracies, run

TASK = replace(TASKS["digits"], sizes=(8, 16, 32, 64), steps=600)
SEEDS = range(3)


@pytest.fixture(scope="module")
def alone() -> list[Accuracies]:
    """Each size trained alone."""
    return [run(TASK, METHODS["alone"], seed) for seed in SEEDS]


@pytest.mark.parametrize(
    "name",
    [
        "masked",
        pytest.param("masked, block norm", marks=pytest.mark.slow),
        pytest.param("MRL", marks=pytest.mark.slow),
        pytest.param("sliced, sandwich", marks=pytest.mark.slow),
    ],
)
def test_every_size_comes_within_a_point_of_one_trained_alone(
    name: str, alone: list[Accuracies]
) -> None:
    found = [run(TASK, METHODS[name], seed) for seed in SEEDS]
    for size in TASK.sizes:
        mean = statistics.mean(a[size] for a in found)
        other = statistics.mean(a[size] for a in alone)
        print(f"{name}, size {size}: {mean:.1f}, alone {other:.1f}")
        assert mean > max(90.0, other - 1.0), (name, size)
