"""What a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matryoshkafy.deploy.profile import Cost
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.plan.plan import Plan

Series = Mapping[str, Mapping[int, float]]


class ReportError(MatryoshkafyError):
    """A metrics file that cannot be read, or that speaks of other sizes."""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    costs: {size: cost}. metrics: {metric: {series: {size: value}}}, series "" where there is one.
    """

    name: str
    plan: Plan
    costs: Mapping[int, Cost]
    metrics: Mapping[str, Series]
    footer: str = ""
