"""Cascades by arithmetic on small tables, and what they lose on new samples by drawing many."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from matryoshkafy.serving import Cascade, ServingError, fit_cascade
from matryoshkafy.serving.cascade import NEVER, _confidence, _temperature, _worth, disagreement


def sure(probability: float, label: int) -> list[float]:
    """Two logits whose softmax gives one class a probability."""
    margin = float(np.log(probability / (1 - probability)))
    return [margin, 0.0] if label == 0 else [0.0, margin]


LOGITS = {
    2: np.array([sure(0.9, 0), sure(0.6, 1), sure(0.8, 0), sure(0.7, 1)]),
    4: np.array([sure(0.7, 1), sure(0.9, 0), sure(0.6, 1), sure(0.8, 0)]),
    8: np.array([sure(0.9, 1), sure(0.9, 1), sure(0.9, 1), sure(0.9, 1)]),
}


def test_each_sample_stops_at_the_first_size_that_is_sure() -> None:
    cascade = Cascade((2, 4, 8), (0.85, 0.85, 0.0), (1.0, 1.0, 1.0), (1.0, 10.0, 100.0))
    found = cascade.route(LOGITS)
    assert found.sizes.tolist() == [2, 4, 8, 8]
    assert found.predictions.tolist() == [0, 0, 1, 1]
    assert found.cost == pytest.approx((1 + 11 + 111 + 111) / 4)
    shared = Cascade((2, 4, 8), (0.85, 0.85, 0.0), (1.0,) * 3, (1.0, 10.0, 100.0), shared=True)
    assert shared.route(LOGITS).cost == pytest.approx((1 + 10 + 100 + 100) / 4)
    assert found.accuracy(np.array([0, 1, 1, 1])) == 0.75


def test_a_temperature_moves_who_is_sure() -> None:
    cold = Cascade((2, 4, 8), (0.95, NEVER, 0.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0))
    assert cold.route(LOGITS).sizes.tolist() == [2, 8, 8, 8]


def test_the_temperature_is_the_one_of_least_loss() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 5)) * 2
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(5, p=p) for p in chances])
    assert _temperature(logits, labels) == pytest.approx(1.0, abs=0.06)
    assert _temperature(logits * 3, labels) == pytest.approx(3.0, abs=0.2)


def learned(seed: int, count: int = 120) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Logits of sizes that get better, and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, size=count)
    clean = np.eye(3)[labels] * 2
    return {s: clean + random.normal(size=(count, 3)) * 3 / s for s in (1, 2, 4)}, labels


def full_accuracy(logits: dict[int, np.ndarray], labels: np.ndarray) -> float:
    """Return the largest size's accuracy."""
    return float((logits[max(logits)].argmax(1) == labels).mean())


def lost(cascade: Cascade, logits: dict[int, np.ndarray], labels: np.ndarray) -> float:
    """Return the share that the largest size has right and the cascade does not."""
    full = logits[max(logits)].argmax(1) == labels
    return float((full & (cascade.route(logits).predictions != labels)).mean())


@pytest.mark.parametrize("allowed", [0.01, 0.03, 0.1])
def test_what_a_floor_allows_is_not_lost_on_new_samples(allowed: float) -> None:
    losses = []
    for seed in range(25):
        logits, labels = learned(seed)
        floor = full_accuracy(logits, labels) - allowed
        cascade = fit_cascade(logits, labels, costs=[1, 3, 9], floor=floor)
        losses.append(lost(cascade, *learned(1000 + seed, 500)))
        assert cascade.route(logits).cost < 13
    error = np.std(losses) / len(losses) ** 0.5
    assert np.mean(losses) <= allowed + 2 * error
    # Nor is the floor kept by asking the largest size for everything.
    assert np.mean(losses) >= allowed / 10


def test_a_lower_floor_costs_less_and_a_larger_budget_loses_less() -> None:
    logits, labels = learned(3, 2000)
    full = full_accuracy(logits, labels)
    costs = {"costs": [1, 3, 9], "shared": True}
    floors = [fit_cascade(logits, labels, floor=full - a, **costs) for a in (0.005, 0.02, 0.08)]
    paid = [cascade.route(logits).cost for cascade in floors]
    assert paid[0] > paid[1] > paid[2]
    budgets = [fit_cascade(logits, labels, budget=b, **costs) for b in (0.2, 0.4, 0.8)]
    for budget, cascade in zip((0.2, 0.4, 0.8), budgets, strict=True):
        assert budget - 0.05 <= cascade.route(logits).cost / 9 <= budget
    losses = [lost(cascade, logits, labels) for cascade in budgets]
    assert losses[0] > losses[1] > losses[2]


def test_a_size_that_another_does_not_better_is_not_passed() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, size=1000)
    clean = np.eye(3)[labels] * 2
    middle = clean + random.normal(size=(1000, 3))
    logits = {1: clean + random.normal(size=(1000, 3)) * 3, 2: middle, 4: middle}
    found = fit_cascade(logits, labels, costs=[1, 3, 9], budget=0.5, shared=True).route(logits)
    assert set(found.sizes.tolist()) <= {1, 2}


def test_the_worth_of_a_doubt_is_a_slope_over_a_cost() -> None:
    sure = np.array([[0.5, 0.9, 1.0], [1.0, 1.0, 1.0]])
    answers = np.array([[0, 1, 1], [1, 1, 1]])
    chances = np.array([[0.2, 0.8], [0.0, 1.0], [0.0, 1.0]])
    start = Cascade((1, 4), (NEVER, 0.0), (1.0, 1.0), (1.0, 4.0), shared=True)
    # One sample of doubt 0.5 gains 0.6, one of 0.1 nothing: 0.6 x 0.5 / (0.25 + 0.01), for 3/4.
    assert _worth(sure, answers, chances, start) == pytest.approx([0.3 / 0.26 / 0.75])
    stacked = np.log(np.array([[[0.5, 0.5], [0.1, 0.9]]]))
    assert _confidence(stacked, (1.0,))[0] == pytest.approx(np.array([[0.5, 0.9]]))


def test_without_a_floor_the_accuracy_is_the_best_one() -> None:
    logits, labels = learned(5)
    found = fit_cascade(logits, labels).route(logits)
    assert found.accuracy(labels) >= max((v.argmax(1) == labels).mean() for v in logits.values())


def test_disagreement_counts_what_only_the_small_size_has_right() -> None:
    labels = np.array([0, 1, 1, 0])
    assert disagreement(LOGITS, labels) == {2: 0.25, 4: 0.25}


def test_digits_at_a_part_of_the_cost() -> None:
    x, y = load_digits(return_X_y=True)
    x = x / 16
    order = np.random.default_rng(0).permutation(len(x))
    train, valid, test = order[:900], order[900:1350], order[1350:]
    turned = x @ np.linalg.svd(x[train], full_matrices=False)[2].T
    logits = {}
    for size in (4, 8, 16, 64):
        model = RidgeClassifier().fit(turned[train, :size], y[train])
        logits[size] = model.decision_function(turned[:, :size])
    of = lambda rows: {size: value[rows] for size, value in logits.items()}  # noqa: E731
    cascade = fit_cascade(of(valid), y[valid], budget=0.5, shared=True)
    found = cascade.route(of(test))
    alone = float((logits[64][test].argmax(1) == y[test]).mean())
    error = (alone * (1 - alone) / len(test)) ** 0.5
    assert found.accuracy(y[test]) >= alone - 2 * error
    assert found.cost <= 0.6 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(3, dtype=int)}, "3 labels were given for 4 samples"),
        ({"costs": [1, 2]}, "2 costs were given for the sizes \\[2, 4, 8\\]"),
        ({"floor": 1.0}, "the largest size alone reaches 0.7500"),
        ({"floor": 0.7}, "4 samples vouch for no loss below 0.2000. Give a lower floor, more"),
        ({"budget": 0.1}, "the least that a sample costs here is 0.250 of the largest"),
        ({"budget": 0.5, "floor": 0.5}, "expected one of them"),
        ({"logits": {2: LOGITS[2], 4: LOGITS[4][:2]}}, "expected one \\[N, C\\]"),
        ({"logits": {2: LOGITS[2] * np.nan}}, "hold NaN or an infinity"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    given = {"logits": LOGITS, "labels": np.array([0, 1, 1, 1])} | change
    with pytest.raises(ServingError, match=message):
        fit_cascade(**given)


def test_a_missing_size_is_refused() -> None:
    cascade = Cascade((2, 4), (0.5, 0.0), (1.0, 1.0), (1.0, 2.0))
    with pytest.raises(ServingError, match="the logits have the sizes \\[2\\]"):
        cascade.route({2: LOGITS[2]})
