"""tune(): sizes and list lengths of a funnel, chosen on validation queries."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryoshkafy.serving.funnel import funnel, products
from matryoshkafy.serving.metrics import recall_of, reciprocal_rank_of
from matryoshkafy.serving.vectors import ServingError, Vectors

# List lengths that are tried between the stages, as multiples of k.
SHORTLISTS = (2, 5, 10, 20, 50, 100)
MOST_STAGES = 4


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
        ServingError: where `relevant` has another length, or no setting keeps to the budget.
    """
    if len(relevant) != len(queries):
        raise ServingError(
            f"{len(relevant)} relevant documents were given for {len(queries)} queries; expected "
            "one each"
        )
    allowed = [
        stages
        for stages in _candidates(documents, k)
        if budget is None or products(len(documents), stages) <= budget
    ]
    if not allowed:
        cheapest = len(documents) * documents.sizes[0]
        raise ServingError(
            f"budget={budget:g} multiply-adds per query were given; the cheapest search over "
            f"{len(documents)} documents needs {cheapest:,} (size {documents.sizes[0]}). Allow "
            "more, or give the first stage an index"
        )
    return frontier([measured(queries, documents, relevant, stages) for stages in allowed])


def _candidates(documents: Vectors, k: int) -> Iterator[tuple[tuple[int, int], ...]]:
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
    stages: Sequence[tuple[int, int]],
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
