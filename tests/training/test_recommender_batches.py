"""What the benchmark's BERT4Rec is asked, beside plain lists."""

import numpy as np

from tests.benchmarks.recommender_models import ended_anywhere

HISTORIES = [[5, 6, 7, 8, 9], [3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]


def padded(items: list[int], length: int) -> list[int]:
    return [0] * (length - len(items)) + items


def test_histories_end_anywhere_and_ask_for_the_item_behind() -> None:
    rows = np.array([padded(items, 9) for items in HISTORIES])

    asked: list[set[int]] = [set(), set(), set()]
    for seed in range(60):
        found = ended_anywhere(rows, np.random.default_rng(seed), 1.0)
        for number, items in enumerate(HISTORIES):
            inputs, targets = (part[number].tolist() for part in found)
            end = items.index(targets[-1])
            assert targets == padded([items[end]], 8)
            assert inputs == padded([*items[:end], -1], 8)
            asked[number].add(end)

    # At least one item stands before the one that is asked for.
    assert asked == [{1, 2, 3, 4}, {1}, {1, 2, 3, 4, 5, 6, 7}]


def test_the_other_histories_stay_whole() -> None:
    rows = np.array([padded(items, 9) for items in HISTORIES])

    inputs, targets = ended_anywhere(rows, np.random.default_rng(0), 0.0)

    np.testing.assert_array_equal(np.where(inputs < 0, targets, inputs), rows[:, 1:])
    np.testing.assert_array_equal(targets > 0, inputs < 0)
