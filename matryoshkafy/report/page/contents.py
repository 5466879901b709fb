"""What a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matryoshkafy.deploy.profile import Cost
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.plan.plan import Plan

Series = Mapping[str, Mapping[int, float]]


class ReportError(MatryoshkafyError):
    """A table that cannot be read, or that speaks of other sizes."""


@dataclass(frozen=True)
class Search:
    """One way to search in stages, as `matryoshkafy retrieve --tune` tells it.

    Args:
        stages: "32:200,384:10", the size and the documents kept of each stage.
        recall: share of the relevant documents among the last ones.
        reciprocal_rank: MRR at the same length.
        products: multiply-adds of a query.
    """

    stages: str
    recall: float
    reciprocal_rank: float
    products: float


@dataclass(frozen=True)
class Answer:
    """One size of a cascade.

    Args:
        size: the size.
        accuracy: its share of right answers where it answers everything.
        cost: what that costs.
        answers: share of the samples that it answers in the cascade.
        threshold: how sure it has to be; None where it never answers.
    """

    size: int
    accuracy: float
    cost: float
    answers: float
    threshold: float | None


@dataclass(frozen=True)
class Cascading:
    """A cascade beside each size alone, as `matryoshkafy cascade` tells it.

    Args:
        accuracy: of the cascade.
        cost: mean cost of a sample.
        sizes: what each size does, smallest first.
    """

    accuracy: float
    cost: float
    sizes: tuple[Answer, ...]


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Args:
        name: of the checkpoint.
        plan: its plan.
        costs: {size: cost}.
        metrics: {metric: {series: {size: value}}}, series "" where there is one.
        footer: how it was made.
        inputs: shapes of the inputs that FLOPs and latency belong to.
        searches: ways to search, cheapest first.
        cascade: a cascade over the sizes.
    """

    name: str
    plan: Plan
    costs: Mapping[int, Cost]
    metrics: Mapping[str, Series]
    footer: str = ""
    inputs: str = ""
    searches: tuple[Search, ...] = ()
    cascade: Cascading | None = None
