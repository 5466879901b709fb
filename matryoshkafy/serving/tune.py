"""tune(): sizes and list lengths of a funnel, chosen on validation queries.

Settings share their beginnings: the scores of every size are computed once for some queries (the
price of one exact search), and a setting is then a matter of looking numbers up. Only the settings
that are returned are run, for their time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryoshkafy.serving.funnel import funnel, products
from matryoshkafy.serving.metrics import recall_of, reciprocal_rank_of
from matryoshkafy.serving.select import Ids, best_of
from matryoshkafy.serving.vectors import Floats, ServingError, Vectors, check_relevant

# List lengths that are tried between the stages, as multiples of k.
SHORTLISTS = (2, 5, 10, 20, 50, 100)
MOST_STAGES = 4
BLOCK = 64
Stages = tuple[tuple[int, int], ...]
# What follows a stage: {size: {how many it keeps: what follows it}}; nothing follows the last one.
Tree = dict[int, dict[int, "Tree"]]


@dataclass(frozen=True)
class Setting:
    """One way to search, and what it gave on the validation queries.

    Args:
        sizes: the sizes of the stages.
        keep: how many documents each hands on.
        recall: share of relevant documents among the last ones.
        reciprocal_rank: MRR at the same length.
        products: multiply-adds per query.
        milliseconds: measured time per query; 0 where it was not timed.
    """

    sizes: tuple[int, ...]
    keep: tuple[int, ...]
    recall: float
    reciprocal_rank: float
    products: float
    milliseconds: float = 0.0

    def __str__(self) -> str:
        stages = " > ".join(f"{s}:{k}" for s, k in zip(self.sizes, self.keep, strict=True))
        return (
            f"{stages:34s} recall {self.recall:.4f}  MRR {self.reciprocal_rank:.4f}  "
            f"{self.products:12,.0f} products  {self.milliseconds:.3f} ms"
        )


def tune(
    queries: Vectors,
    documents: Vectors,
    relevant: NDArray[np.int64],
    *,
    budget: float | None = None,
    k: int = 10,
) -> list[Setting]:
    """Return the settings worth choosing from, cheapest first: each is better than all cheaper.

    Every ladder of up to four stages and six shortlists between them is tried on the validation
    queries; the full size alone, exactly, is the last row. There is no one answer: how much recall
    a product is worth is for the caller to say.

    Args:
        queries: validation queries; not those that the result is reported on.
        documents: the table to search.
        relevant: int64 [queries], the row of the relevant document of each query.
        budget: most multiply-adds per query; None for no limit.
        k: how many documents are wanted.

    Raises:
        ServingError: where `relevant` names no row for each query, or no setting keeps to the
            budget.
    """
    check_relevant(relevant, queries, documents)
    relevant = np.asarray(relevant)
    if k < 1:
        raise ServingError(f"k={k} was given; expected how many documents are wanted, from 1 on")
    allowed = [
        stages
        for stages in candidates(documents, k)
        if budget is None or products(len(documents), stages) <= budget
    ]
    if not allowed:
        cheapest = len(documents) * documents.sizes[0]
        raise ServingError(
            f"budget={budget:g} multiply-adds per query were given; the cheapest search over "
            f"{len(documents)} documents needs {cheapest:,} (size {documents.sizes[0]}). Allow "
            "more, or give the first stage an index"
        )
    best = frontier(judged(queries, documents, relevant, allowed))
    return [measured(queries, documents, relevant, _stages(setting)) for setting in best]


def judged(
    queries: Vectors, documents: Vectors, relevant: NDArray[np.int64], allowed: Sequence[Stages]
) -> list[Setting]:
    """Return every setting with its recall and MRR, not timed."""
    queries.check_against(documents)
    tree: Tree = {}
    for stages in allowed:
        below = tree
        for size, kept in stages:
            below = below.setdefault(size, {}).setdefault(kept, {})
    sums = {stages: np.zeros(2) for stages in allowed}
    for at in range(0, len(queries), BLOCK):
        rows = slice(at, at + BLOCK)
        _Judge(_scores(queries, documents, rows), relevant[rows], sums).walk(tree)
    return [_setting(stages, found / len(queries), documents) for stages, found in sums.items()]


def _setting(stages: Stages, found: NDArray[np.float64], documents: Vectors) -> Setting:
    sizes, keep = zip(*stages, strict=True)
    recall, reciprocal_rank = found.tolist()
    return Setting(sizes, keep, recall, reciprocal_rank, products(len(documents), stages))


def _scores(queries: Vectors, documents: Vectors, rows: slice) -> dict[int, Floats]:
    """Return the cosines of some queries with all documents at every size, but for a factor."""
    asked, before = queries.values[rows], 0
    out: dict[int, Floats] = {}
    dots = np.zeros((len(asked), len(documents)), dtype=np.float32)
    for level, size in enumerate(documents.sizes):
        dots += asked[:, before:size] @ np.transpose(documents.values[:, before:size])
        out[size], before = dots * documents.inverse_lengths[:, level], size
    return out


class _Judge:
    """Walks the settings of some queries, and adds up what each gave.

    Args:
        scores: {size: [queries, documents]}.
        relevant: int64 [queries].
        sums: {stages: (hits, reciprocal ranks)}, added to.
    """

    def __init__(
        self, scores: dict[int, Floats], relevant: Ids, sums: dict[Stages, NDArray[np.float64]]
    ) -> None:
        self.scores, self.relevant, self.sums = scores, relevant[:, None], sums

    def walk(self, tree: Tree, ids: Ids | None = None, before: Stages = ()) -> None:
        """Judge what follows some stages that left the documents `ids` (None: all of them)."""
        for size, lists in tree.items():
            scores = self.scores[size]
            left = scores if ids is None else np.take_along_axis(scores, ids, axis=1)
            ends = [kept for kept, after in lists.items() if not after]
            goes_on = {kept: after for kept, after in lists.items() if after}
            for kept in ends:
                self._judge((*before, (size, kept)), left, ids)
            if goes_on:
                chosen = _sorted(left, max(goes_on))
                found = chosen if ids is None else np.take_along_axis(ids, chosen, axis=1)
                for kept, after in goes_on.items():
                    self.walk(after, found[:, :kept], (*before, (size, kept)))

    def _judge(self, stages: Stages, left: Floats, ids: Ids | None) -> None:
        size, kept = stages[-1]
        own = np.take_along_axis(self.scores[size], self.relevant, axis=1)
        ranks = 1 + (left > own).sum(axis=1)
        found = ranks <= kept
        if ids is not None:
            found &= (ids == self.relevant).any(axis=1)
        self.sums[stages] += found.sum(), (found / ranks).sum()


def _sorted(scores: Floats, k: int) -> Ids:
    """Return the columns of the k largest scores of each row, largest first."""
    best = best_of(scores, k)
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


def _stages(setting: Setting) -> Stages:
    return tuple(zip(setting.sizes, setting.keep, strict=True))


def candidates(documents: Vectors, k: int) -> Iterator[Stages]:
    """Yield the stages to try: (size, kept) pairs, the last size is the full one or any alone."""
    lists = sorted({min(k * times, len(documents)) for times in SHORTLISTS}, reverse=True)
    for size in documents.sizes:
        yield ((size, k),)
    for count in range(1, min(MOST_STAGES, len(documents.sizes))):
        for before in itertools.combinations(documents.sizes[:-1], count):
            for kept in itertools.combinations(lists, count):
                yield (*zip(before, kept, strict=True), (documents.width, k))


def measured(
    queries: Vectors,
    documents: Vectors,
    relevant: NDArray[np.int64],
    stages: Stages,
) -> Setting:
    """Return a setting with its recall, MRR, products and time on these queries."""
    sizes, keep = zip(*stages, strict=True)
    started = time.perf_counter()
    found = funnel(queries, documents, sizes=sizes, keep=keep)
    spent = (time.perf_counter() - started) / len(queries) * 1000
    return Setting(
        sizes,
        keep,
        recall_of(found.ids, relevant),
        reciprocal_rank_of(found.ids, relevant),
        found.products,
        spent,
    )


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings that no cheaper one equals in recall, cheapest first."""
    best: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.products, -s.recall)):
        if not best or setting.recall > best[-1].recall:
            best.append(setting)
    return best
