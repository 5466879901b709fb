"""Cascades by arithmetic on small tables, and against an exhaustive search over thresholds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from matryoshkafy.serving import Cascade, ServingError, fit_cascade
from matryoshkafy.serving.cascade import NEVER, _temperature, disagreement


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


def learned(seed: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Logits of sizes that get better, and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, size=120)
    clean = np.eye(3)[labels] * 2
    return {s: clean + random.normal(size=(120, 3)) * 3 / s for s in (1, 2, 4)}, labels


@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_thresholds_keep_the_floor(seed: int) -> None:
    logits, labels = learned(seed)
    full = float((logits[4].argmax(1) == labels).mean())
    cascade = fit_cascade(logits, labels, costs=[1, 3, 9], floor=full, calibrate=False)
    found = cascade.route(logits)
    assert found.accuracy(labels) >= full
    assert found.cost <= 13
    best = min(
        routed.cost
        for pair in itertools.product(np.linspace(0.3, 1.0, 40).tolist() + [NEVER], repeat=2)
        for routed in [Cascade((1, 2, 4), (*pair, 0.0), (1.0,) * 3, (1.0, 3.0, 9.0)).route(logits)]
        if routed.accuracy(labels) >= full
    )
    assert found.cost <= best * 1.15


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
    full = float((logits[64][valid].argmax(1) == y[valid]).mean())
    cascade = fit_cascade(of(valid), y[valid], floor=full, shared=True)
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
