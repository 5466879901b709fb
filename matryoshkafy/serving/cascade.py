"""Cascades: small sizes answer what they are sure of, larger ones the rest (MRL, section 4.2.1).

A size is sure where its largest softmax probability reaches its threshold. Thresholds are learned
on validation data: as MRL's appendix does it (a grid of 100, the smallest of best accuracy, size by
size), or as the cheapest ones that keep an accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from matryoshkafy.serving.vectors import ServingError

Logits = NDArray[np.floating[Any]]
GRID = 100
ROUNDS = 8
# No probability is above 1: a size with this threshold answers nothing.
NEVER = np.inf


@dataclass(frozen=True, eq=False)
class Routed:
    """What a cascade answered.

    Args:
        predictions: int64 [N], classes.
        sizes: int64 [N], the size that answered each.
        cost: the mean cost of a sample.
    """

    predictions: NDArray[np.int64]
    sizes: NDArray[np.int64]
    cost: float

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        """Return the share of right answers."""
        return float((self.predictions == labels).mean())


@dataclass(frozen=True)
class Cascade:
    """When each size answers.

    Args:
        sizes: ascending.
        thresholds: least probability with which a size answers, one each; the last size answers
            whatever reaches it.
        temperatures: what each size's logits are divided by first (Guo et al. 2017).
        costs: what it costs to have each size's answer, alone.
        shared: whether a larger size continues a smaller one (masked nesting), so that reaching it
            costs only the difference; else a sample pays every size that it passed.
    """

    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    costs: tuple[float, ...]
    shared: bool = False

    @property
    def paid(self) -> NDArray[np.float64]:
        """What a sample has paid that each size answers."""
        costs = np.asarray(self.costs, dtype=np.float64)
        return costs if self.shared else np.cumsum(costs)

    def route(self, logits: Mapping[int, Logits]) -> Routed:
        """Return the answers, given every size's logits [N, classes].

        Raises:
            ServingError: where a size is missing, or logits differ in shape or are not finite.
        """
        stacked = _stacked(logits, self.sizes)
        sure, answers = _confidence(stacked, self.temperatures)
        level = _level(sure, self.thresholds)
        each = np.arange(stacked.shape[1], dtype=np.int64)
        return Routed(
            answers[level, each],
            np.asarray(self.sizes, dtype=np.int64)[level],
            float(self.paid[level].mean()),
        )


def fit_cascade(  # noqa: PLR0913  the public signature
    logits: Mapping[int, Logits],
    labels: NDArray[np.int64],
    *,
    costs: Sequence[float] | None = None,
    floor: float | None = None,
    shared: bool = False,
    calibrate: bool = True,
) -> Cascade:
    """Learn a cascade's thresholds on validation data.

    Args:
        logits: {size: [N, classes]} of validation samples.
        labels: int64 [N].
        costs: what each size costs, ascending with the sizes; the sizes themselves by default.
        floor: the accuracy to keep at the least cost; None learns thresholds size by size for the
            best accuracy, as MRL does.
        shared: whether a larger size continues a smaller one, see `Cascade`.
        calibrate: fit one temperature a size before.

    Raises:
        ServingError: where shapes do not fit, or no thresholds keep the floor.
    """
    sizes = tuple(sorted(logits))
    stacked = _stacked(logits, sizes)
    if stacked.shape[1] != len(labels):
        raise ServingError(
            f"{len(labels)} labels were given for {stacked.shape[1]} samples; expected one each"
        )
    costs = tuple(float(c) for c in (sizes if costs is None else costs))
    if len(costs) != len(sizes):
        raise ServingError(f"{len(costs)} costs were given for the sizes {list(sizes)}")
    temperatures = tuple(_temperature(level, labels) if calibrate else 1.0 for level in stacked)
    start = Cascade(sizes, (NEVER,) * (len(sizes) - 1) + (0.0,), temperatures, costs, shared)
    sure, answers = _confidence(stacked, temperatures)
    right = answers == labels
    if floor is None:
        return _with(start, _best_accuracy(sure, right))
    return _with(start, _cheapest(sure, right, start.paid, floor))


def disagreement(logits: Mapping[int, Logits], labels: NDArray[np.int64]) -> dict[int, float]:
    """Return, for each size but the largest, the share of samples that it alone has right.

    Right at the small size and wrong at the largest: what no routing by size can explain by
    capacity, and what an ensemble could gain.
    """
    sizes = sorted(logits)
    stacked = _stacked(logits, sizes)
    right = stacked.argmax(axis=2) == labels
    return {size: float((right[i] & ~right[-1]).mean()) for i, size in enumerate(sizes[:-1])}


def _with(cascade: Cascade, thresholds: Sequence[float]) -> Cascade:
    return Cascade(
        cascade.sizes, tuple(thresholds), cascade.temperatures, cascade.costs, cascade.shared
    )


def _stacked(logits: Mapping[int, Logits], sizes: Sequence[int]) -> NDArray[np.float64]:
    missing = [size for size in sizes if size not in logits]
    if missing or not sizes:
        raise ServingError(
            f"the logits have the sizes {sorted(logits)}; the cascade needs {list(sizes)}"
        )
    shapes = {np.shape(logits[size]) for size in sizes}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ServingError(f"logits of shapes {sorted(shapes)} were given; expected one [N, C]")
    stacked = np.stack([np.asarray(logits[size], dtype=np.float64) for size in sizes])
    if not np.isfinite(stacked).all():
        raise ServingError("the logits hold NaN or an infinity; look for it before routing")
    return stacked


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = logits - logits.max(axis=-1, keepdims=True)
    return centred - np.log(np.exp(centred).sum(axis=-1, keepdims=True))


def _temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the temperature of least negative log likelihood."""
    each = np.arange(len(labels), dtype=np.int64)

    def loss(log_temperature: float) -> float:
        return float(-_log_softmax(logits / np.exp(log_temperature))[each, labels].mean())

    search: Any = optimize
    found = search.minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))


def _confidence(
    stacked: NDArray[np.float64], temperatures: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the largest probability [sizes, N] and its class."""
    scaled = stacked / np.asarray(temperatures)[:, None, None]
    return np.exp(_log_softmax(scaled).max(axis=2)), stacked.argmax(axis=2)


def _level(sure: NDArray[np.float64], thresholds: Sequence[float]) -> NDArray[np.int64]:
    """Return the first level that is sure enough, [N]; the last where none is."""
    passed = sure >= np.asarray(thresholds)[:, None]
    passed[-1] = True
    return np.argmax(passed, axis=0).astype(np.int64)


def _grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    grid = np.linspace(float(values.min()), float(values.max()), GRID, dtype=np.float64)
    return np.concatenate([grid, np.asarray([NEVER], dtype=np.float64)])


def _best_accuracy(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> list[float]:
    """From the second largest size down, the smallest threshold of best accuracy."""
    thresholds = [NEVER] * (len(sure) - 1) + [0.0]
    each = np.arange(sure.shape[1], dtype=np.int64)
    for size in reversed(range(len(sure) - 1)):
        scored: list[tuple[float, float]] = []
        for threshold in _grid(sure[size]):
            tried = [*thresholds[:size], threshold, *thresholds[size + 1 :]]
            scored.append((-float(right[_level(sure, tried), each].mean()), float(threshold)))
        thresholds[size] = min(scored)[1]
    return thresholds


def _cheapest(
    sure: NDArray[np.float64],
    right: NDArray[np.bool_],
    paid: NDArray[np.float64],
    floor: float,
) -> list[float]:
    """Lower one threshold at a time, the one that saves most, while the accuracy holds."""
    thresholds = [NEVER] * (len(sure) - 1) + [0.0]
    each = np.arange(sure.shape[1], dtype=np.int64)

    def judged(tried: list[float]) -> tuple[float, float]:
        level = _level(sure, tried)
        return float(right[level, each].mean()), float(paid[level].mean())

    if judged(thresholds)[0] < floor:
        raise ServingError(
            f"floor={floor:g} was given; the largest size alone reaches "
            f"{judged(thresholds)[0]:.4f} on these samples. Give a lower floor"
        )
    cost = judged(thresholds)[1]
    for _ in range(ROUNDS):
        tried = [
            [*thresholds[:size], float(value), *thresholds[size + 1 :]]
            for size in range(len(sure) - 1)
            for value in _grid(sure[size])
        ]
        kept = [(judged(t)[1], t) for t in tried if judged(t)[0] >= floor]
        best, chosen = min(kept, key=lambda pair: pair[0], default=(cost, thresholds))
        if best >= cost:
            return thresholds
        cost, thresholds = best, chosen
    return thresholds
