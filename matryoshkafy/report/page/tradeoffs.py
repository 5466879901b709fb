"""The sections of a report that set what is achieved against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from matryoshkafy.deploy.profile import Cost
from matryoshkafy.report import pictures
from matryoshkafy.report.page.contents import Cascading, Report, Search, Series
from matryoshkafy.report.page.html import beside, figure, grid, section
from matryoshkafy.report.page.numbers import counted, timed
from matryoshkafy.report.pictures.svg import tag
from matryoshkafy.report.pictures.tradeoffs import Point

MOST_METRICS = 4
COSTS: tuple[tuple[str, Callable[[Cost], float], Callable[[float], str]], ...] = (
    ("parameters", lambda cost: cost.parameters, counted),
    ("FLOPs", lambda cost: cost.flops, counted),
    ("latency", lambda cost: cost.latency, timed),
)


def quality_against_cost(report: Report) -> str:
    """Each metric over parameters, FLOPs and latency; nothing where no metrics were given."""
    figures = [
        figure(
            f"{metric} against {name}",
            pictures.tradeoff(_over(lines, report.costs, cost), form, f"{metric} over {name}"),
            key(lines),
        )
        for metric, lines in list(report.metrics.items())[:MOST_METRICS]
        for name, cost, form in COSTS
    ]
    return section("Quality against cost", grid(figures)) if figures else ""


def _over(
    lines: Series, costs: Mapping[int, Cost], cost: Callable[[Cost], float]
) -> dict[str, list[Point]]:
    levels = {size: level for level, size in enumerate(costs)}
    return {
        name: [Point(cost(costs[s]), value, str(s), levels[s]) for s, value in line.items()]
        for name, line in lines.items()
    }


def retrieval(searches: Sequence[Search]) -> str:
    """Recall and MRR over multiply-adds, and the stages; nothing where there are none."""
    if not searches:
        return ""
    series = {
        "recall": [Point(s.products, s.recall, str(k)) for k, s in enumerate(searches, 1)],
        "MRR": [Point(s.products, s.reciprocal_rank, str(k)) for k, s in enumerate(searches, 1)],
    }
    drawn = pictures.tradeoff(series, counted, "recall and MRR over multiply-adds of a query")
    chart = figure("recall and MRR against multiply-adds", drawn, key(series))
    rows = [
        (
            k,
            counted(s.products),
            f"{s.recall:.4f}",
            f"{s.reciprocal_rank:.4f}",
            s.stages.replace(",", " > "),
        )
        for k, s in enumerate(searches, 1)
    ]
    words = tag("p", "A stage is a size and how many documents it hands on.")
    head = ("", "multiply-adds", "recall", "MRR", "stages")
    return section("Search in stages", words + beside([chart], head, rows))


def cascading(cascade: Cascading | None) -> str:
    """Accuracy of a cascade over its mean cost, beside every size alone."""
    if cascade is None:
        return ""
    series = {
        "each size alone": [Point(a.cost, a.accuracy, str(a.size)) for a in cascade.sizes],
        "cascade": [Point(cascade.cost, cascade.accuracy, "cascade")],
    }
    drawn = pictures.tradeoff(series, _plain, "accuracy over mean cost of a sample")
    rows = [
        (a.size, "never" if a.threshold is None else f"{a.threshold:.3f}", f"{a.answers:.1%}",
         f"{a.accuracy:.4f}", _plain(a.cost))
        for a in cascade.sizes
    ]  # fmt: skip
    largest = cascade.sizes[-1]
    words = tag(
        "p",
        f"The cascade answers {cascade.accuracy:.4f} right at {cascade.cost / largest.cost:.0%} of "
        f"the cost of size {largest.size}, which alone answers {largest.accuracy:.4f}.",
    )
    head = ("size", "sure from", "answers", "accuracy alone", "cost alone")
    chart = figure("accuracy against mean cost", drawn, key(series))
    return section("Cascade", words + beside([chart], head, rows))


def _plain(value: float) -> str:
    return counted(value) if value >= 1000 else f"{value:.3g}"


def key(lines: Mapping[str, object]) -> str:
    """Return which colour is which series; nothing where there is one without a name."""
    if list(lines) == [""]:
        return ""
    rows = (
        tag("span", tag("i", style=f"background:{pictures.colour(k)}"), escape(name))
        for k, name in enumerate(lines)
    )
    return tag("div", *rows, class_="key")
