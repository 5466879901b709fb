"""Metrics of {size: scores}: against sorting by hand, with ties and banned items."""

from __future__ import annotations

import math

import pytest
import torch

from matryoshkafy.serving import Banned, ServingError, metrics_by_size


def by_sorting(scores: torch.Tensor, target: torch.Tensor, cutoff: int) -> dict[str, float]:
    found = dict.fromkeys((f"NDCG@{cutoff}", f"Recall@{cutoff}", f"MRR@{cutoff}"), 0.0)
    for row, wanted in zip(scores, target.tolist(), strict=True):
        place = row.argsort(descending=True).tolist().index(wanted) + 1
        if place <= cutoff:
            gains = (1 / math.log2(place + 1), 1.0, 1 / place)
            found = {n: v + g / len(target) for (n, v), g in zip(found.items(), gains, strict=True)}
    return found


@pytest.mark.parametrize("cutoff", [1, 5, 20])
def test_metrics_of_each_size_are_those_of_sorting(cutoff: int) -> None:
    random = torch.Generator().manual_seed(0)
    scores = {size: torch.rand(30, 20, generator=random) for size in (4, 8)}
    target = torch.randint(20, (30,), generator=random)
    for given in (scores, iter(scores.items())):
        found = metrics_by_size(given, target, cutoffs=(cutoff,))
        assert list(found) == [4, 8]
        for size, metrics in found.items():
            assert metrics == pytest.approx(by_sorting(scores[size], target, cutoff))


def test_a_model_that_scores_everything_alike_gets_what_chance_gives() -> None:
    found = metrics_by_size({8: torch.zeros(3, 50)}, torch.tensor([0, 7, 49]))
    assert found[8]["Recall@10"] == pytest.approx(10 / 50)


def test_banned_items_leave_their_places() -> None:
    scores, target = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([2])
    banned = Banned(torch.tensor([0]), torch.tensor([0]))
    assert metrics_by_size({1: scores}, target)[1]["MRR@10"] == pytest.approx(1 / 3)
    assert metrics_by_size({1: scores}, target, banned=banned)[1]["MRR@10"] == pytest.approx(1 / 2)
    gone = Banned(torch.tensor([0]), torch.tensor([2]))
    assert metrics_by_size({1: scores}, target, banned=gone)[1]["Recall@10"] == 0


@pytest.mark.parametrize(
    ("scores", "words"),
    [(torch.zeros(2, 3, 4), "has scores"), (torch.zeros(3, 4), "expected"),
     (torch.full((2, 4), torch.nan), "NaN")],
)  # fmt: skip
def test_what_does_not_fit_is_told(scores: torch.Tensor, words: str) -> None:
    with pytest.raises(ServingError, match=words):
        metrics_by_size({8: scores}, torch.tensor([1, 2]))
