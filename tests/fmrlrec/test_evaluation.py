"""Metrics against a naive oracle that sorts, ties against the mean over all orders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import polars as pl
import pytest
import torch

from examples.fmrlrec import data, evaluation
from examples.fmrlrec.config import Config, RunError, replace
from matryoshkafy.serving.ranks import Ranks


def naive(order: list[int], target: int, cutoff: int) -> dict[str, float]:
    place = order.index(target) + 1 if target in order else math.inf
    hit = place <= cutoff
    return {
        f"NDCG@{cutoff}": 1 / math.log2(place + 1) if hit else 0.0,
        f"Recall@{cutoff}": float(hit),
        f"MRR@{cutoff}": 1 / place if hit else 0.0,
    }


def naive_all(order: list[int], target: int) -> dict[str, float]:
    parts = [naive(order, target, cutoff) for cutoff in evaluation.CUTOFFS]
    return {name: value for part in parts for name, value in part.items()}


@pytest.fixture
def dataset() -> data.Dataset:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 12, 40)
    items = random.integers(1, 81, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    catalogue = pl.DataFrame({"item_id": range(1, 81)})
    return data.Dataset(items, offsets, pl.Series(range(40)), catalogue, {})


def random_scorer(sequences: torch.Tensor):
    """Scores that depend on the sequence alone, so that the oracle can recompute them."""
    for size in (4, 8):
        seeds = [[size, *sequence[sequence > 0].tolist()] for sequence in sequences]
        rows = [np.random.default_rng(seed).normal(size=81) for seed in seeds]
        yield str(size), torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_metrics_match_the_oracle(split: str, dataset: data.Dataset) -> None:
    config = replace(Config(), {"eval_batch": 7, "max_length": 50})
    found = evaluation.evaluate(random_scorer, dataset, split, config)
    back = {"validation": 2, "test": 1}[split]
    users = [u for u in range(dataset.users) if len(dataset.sequence(u)) >= 3]
    for size, protocol in itertools.product((4, 8), evaluation.PROTOCOLS):
        rows = []
        for user in users:
            past, target = dataset.sequence(user)[:-back], int(dataset.sequence(user)[-back])
            scores = np.random.default_rng([size, *past.tolist()]).normal(size=81)
            banned = set(past.tolist()) if protocol == "unseen" else set()
            order = [i for i in np.argsort(-scores).tolist() if i and i not in banned]
            rows.append(naive_all(order, target))
        for name, value in found[str(size)][protocol].items():
            assert value == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-12)


@pytest.mark.parametrize("level", [0, 1, 4])
@pytest.mark.parametrize("above", [0, 3, 4, 9, 49])
def test_ties_take_the_mean_over_all_places(above: int, level: int) -> None:
    ranks = Ranks(torch.tensor([above]), torch.tensor([level]))
    orders = [[*range(1, above + place), 0] for place in range(1, level + 2)]
    expected = [naive_all(order, 0) for order in orders]
    for name, value in evaluation.gains(ranks, evaluation.CUTOFFS).items():
        assert value == pytest.approx(np.mean([row[name] for row in expected]), abs=1e-12)


def test_rank_counts_above_and_level() -> None:
    scores = torch.tensor([[9.0, 3.0, 2.0, 2.0, 2.0], [9.0, 1.0, 1.0, 1.0, 1.0]])
    target = torch.tensor([2, 4])
    ranks = evaluation.rank(scores, target)
    assert ranks.above.tolist() == [2, 1] and ranks.level.tolist() == [2, 3]
    banned = evaluation.Banned(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 3, 4]))
    ranks = evaluation.without(ranks, scores, target, banned)
    assert ranks.above.tolist() == [0, -1] and ranks.level[0] == 1


def test_constant_scores_are_worth_chance(dataset: data.Dataset) -> None:
    def constant(sequences):
        yield "8", torch.zeros(len(sequences), 81)

    found = evaluation.evaluate(constant, dataset, "test", Config())
    assert found["8"]["all"]["Recall@10"] == pytest.approx(10 / 80)


def test_padding_is_never_ranked(dataset: data.Dataset) -> None:
    def padding_first(sequences):
        scores = torch.zeros(len(sequences), 81)
        scores[:, 0] = torch.inf
        yield "8", scores

    found = evaluation.evaluate(padding_first, dataset, "test", Config())
    assert found["8"]["all"]["Recall@10"] == pytest.approx(10 / 80)


def test_scores_that_are_not_finite_are_refused(dataset: data.Dataset) -> None:
    def broken(sequences):
        yield "8", torch.full((len(sequences), 81), torch.nan)

    with pytest.raises(RunError, match="size 8"):
        evaluation.evaluate(broken, dataset, "test", Config())


def test_popularity_scores_everybody_alike() -> None:
    counts = np.array([0, 5, 2])
    ((name, scores),) = evaluation.popularity_scorer(counts)(torch.zeros(3, 2))
    assert name == "popularity" and scores.tolist() == [[0, 5, 2]] * 3
