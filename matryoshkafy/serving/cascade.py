"""Cascades: small sizes answer what they are sure of, larger ones the rest (MRL, section 4.2.1).

A size is sure where its largest softmax probability reaches its threshold. Thresholds are learned
on validation data. MRL's appendix does it size by size (a grid of 100, the smallest of best
accuracy), which can be lucky on the validation samples. With a floor or a budget there is one
number to choose, the price of a right answer: every size answers where asking a larger one is not
worth it. What that loses on new samples has a bound (conformal risk control, Angelopoulos et al.,
ICLR 2024, theorem 1; the few numbers that are fitted before it count as given).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from matryoshkafy.serving.vectors import ServingError

Logits = NDArray[np.floating[Any]]
GRID = 100
# Prices that are tried.
TRIED = 300
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
    budget: float | None = None,
    shared: bool = False,
) -> Cascade:
    """Learn a cascade's temperatures, then its thresholds, on validation data.

    Args:
        logits: {size: [N, classes]} of validation samples.
        labels: int64 [N].
        costs: what each size costs, ascending with the sizes; the sizes themselves by default.
        floor: the accuracy to keep at the least cost. What the largest size has above it is the
            part of the samples that small sizes may get wrong where the largest is right, expected
            on new samples; what they alone have right does not pay for it.
        budget: the most that a sample costs in the mean, as a share of the largest size's cost:
            the cascade that loses least keeps to it. Without either, thresholds are learned size by
            size for the best accuracy, as MRL does.
        shared: whether a larger size continues a smaller one, see `Cascade`.

    Raises:
        ServingError: where shapes do not fit, both floor and budget are given, or no threshold
            keeps them.
    """
    if floor is not None and budget is not None:
        raise ServingError(
            f"floor={floor:g} and budget={budget:g} were given; expected one of them: the other "
            "follows from it"
        )
    sizes = tuple(sorted(logits))
    stacked = _stacked(logits, sizes)
    if stacked.shape[1] != len(labels):
        raise ServingError(
            f"{len(labels)} labels were given for {stacked.shape[1]} samples; expected one each"
        )
    costs = tuple(float(c) for c in (sizes if costs is None else costs))
    if len(costs) != len(sizes):
        raise ServingError(f"{len(costs)} costs were given for the sizes {list(sizes)}")
    temperatures = tuple(_temperature(level, labels) for level in stacked)
    start = Cascade(sizes, (NEVER,) * (len(sizes) - 1) + (0.0,), temperatures, costs, shared)
    sure, answers = _confidence(stacked, temperatures)
    right = answers == labels
    if floor is None and budget is None:
        return replace(start, thresholds=_best_accuracy(sure, right))
    chances = np.exp(_log_softmax(stacked[-1] / temperatures[-1]))
    tried = _tried(sure, right, start, _worth(sure, answers, chances, start))
    if floor is not None:
        return replace(start, thresholds=_cheapest(tried, right, floor))
    return replace(start, thresholds=_safest(tried, start, budget or 0.0))


def disagreement(logits: Mapping[int, Logits], labels: NDArray[np.int64]) -> dict[int, float]:
    """Return, for each size but the largest, the share of samples that it alone has right.

    Right at the small size and wrong at the largest: what no routing by size can explain by
    capacity, and what an ensemble could gain.
    """
    sizes = sorted(logits)
    stacked = _stacked(logits, sizes)
    right = stacked.argmax(axis=2) == labels
    return {size: float((right[i] & ~right[-1]).mean()) for i, size in enumerate(sizes[:-1])}


def _stacked(logits: Mapping[int, Logits], sizes: Sequence[int]) -> NDArray[np.float64]:
    missing = [size for size in sizes if size not in logits]
    if missing or not sizes:
        raise ServingError(
            f"the logits have the sizes {sorted(logits)}; the cascade needs {list(sizes)}"
        )
    each = [np.asarray(logits[size], dtype=np.float64) for size in sizes]
    shapes = {one.shape for one in each}
    if len(shapes) != 1 or each[0].ndim != 2:
        raise ServingError(f"logits of shapes {sorted(shapes)} were given; expected one [N, C]")
    stacked = np.stack(each)
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


def _best_accuracy(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[float, ...]:
    """From the second largest size down, the smallest threshold of best accuracy."""
    thresholds = [NEVER] * (len(sure) - 1) + [0.0]
    each = np.arange(sure.shape[1], dtype=np.int64)
    for size in reversed(range(len(sure) - 1)):
        scored: list[tuple[float, float]] = []
        for threshold in _grid(sure[size]):
            tried = [*thresholds[:size], threshold, *thresholds[size + 1 :]]
            scored.append((-float(right[_level(sure, tried), each].mean()), float(threshold)))
        thresholds[size] = min(scored)[1]
    return tuple(thresholds)


def _worth(
    sure: NDArray[np.float64],
    answers: NDArray[np.int64],
    chances: NDArray[np.float64],
    start: Cascade,
) -> NDArray[np.float64]:
    """What a size's doubt is worth, for each size but the last: right answers for its cost.

    A larger size is right more often by about a constant times the doubt (1 - the largest
    probability), by least squares. The judge is the largest size: its chances [N, classes] say how
    much better an answer is, which has less noise than labels; labels decide on what is lost.
    """
    levels, count = sure.shape
    each = np.arange(count, dtype=np.int64)
    good = np.stack([chances[each, answers[level]] for level in range(levels)])
    doubt, paid = 1 - sure, start.paid / start.costs[-1]
    found = np.zeros(levels - 1, dtype=np.float64)
    for size in range(levels - 1):
        square = max(float(np.square(doubt[size]).sum()), np.finfo(np.float64).tiny)
        gains = ((good[size + 1 :] - good[size]) * doubt[size]).sum(axis=1) / square
        found[size] = max(0.0, float((gains / (paid[size + 1 :] - paid[size])).max()))
    return found


@dataclass(frozen=True)
class _Tried:
    """The thresholds at a price, the loss that they may have on new samples, and their cost."""

    thresholds: tuple[float, ...]
    bound: float
    cost: float


def _tried(
    sure: NDArray[np.float64],
    right: NDArray[np.bool_],
    start: Cascade,
    worth: NDArray[np.float64],
) -> Iterator[_Tried]:
    """Yield thresholds from the largest down: losses only grow, and costs only fall.

    A sample is lost where the largest size is right and the answer is not. One that was lost at
    larger thresholds stays lost, as the theorem asks; it adds one lost sample to those seen.
    """
    count = sure.shape[1]
    each = np.arange(count, dtype=np.int64)
    gone = np.zeros(count, dtype=np.bool_)
    worths = (1 - sure[:-1]) * worth[:, None]
    for price in np.unique(np.quantile(worths, np.linspace(0, 1, TRIED, dtype=np.float64))):
        thresholds = [max(0.0, 1 - float(price) / w) if w > 0 else 0.0 for w in worth.tolist()]
        level = _level(sure, [*thresholds, 0.0])
        gone |= right[-1] & ~right[level, each]
        bound = (int(gone.sum()) + 1) / (count + 1)
        yield _Tried((*thresholds, 0.0), bound, float(start.paid[level].mean()))


def _cheapest(tried: Iterator[_Tried], right: NDArray[np.bool_], floor: float) -> tuple[float, ...]:
    """The smallest thresholds whose expected loss keeps the floor."""
    full, count = float(right[-1].mean()), right.shape[1]
    kept = [t for t in tried if t.bound <= full - floor]
    if not kept:
        raise ServingError(
            f"floor={floor:g} was given; the largest size alone reaches {full:.4f} on these "
            f"samples, and {count:,} samples vouch for no loss below {1 / (count + 1):.4f}. Give "
            "a lower floor, more samples, or a budget"
        )
    return kept[-1].thresholds


def _safest(tried: Iterator[_Tried], start: Cascade, budget: float) -> tuple[float, ...]:
    """The largest thresholds that keep to the budget."""
    least = start.costs[0]
    for found in tried:
        least = found.cost
        if found.cost <= budget * start.costs[-1]:
            return found.thresholds
    raise ServingError(
        f"budget={budget:g} was given; the least that a sample costs here is "
        f"{least / start.costs[-1]:.3f} of the largest size's cost. Allow more"
    )
