"""The sections of a report, each a function of its contents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape

from matryoshkafy.plan.plan import Plan
from matryoshkafy.report import pictures
from matryoshkafy.report.page.contents import Report, Series
from matryoshkafy.report.page.html import figure, folded, grid, section, table
from matryoshkafy.report.page.numbers import counted, stored, timed
from matryoshkafy.report.pictures.svg import opacity, tag

MOST_CHARTS = 12
COSTS: tuple[tuple[str, Callable[[float], str], str], ...] = (
    ("parameters", counted, "parameters"),
    ("bytes", stored, "of weights"),
    ("flops", counted, "FLOPs"),
    ("latency", timed, "a call"),
)


def costs_section(report: Report) -> str:
    """Bars of parameters, bytes, FLOPs and latency over sizes, and their table."""
    charts = [
        figure(name, pictures.bars(_column(report, name), form, f"{name} by size"))
        for name, form, _ in COSTS
    ]
    head = ("size", *(name for name, _, _ in COSTS), "share of parameters")
    rows = [
        (size, *(form(getattr(cost, name)) for name, form, _ in COSTS), _share(report, size))
        for size, cost in report.costs.items()
    ]
    return section("What each size costs", grid(charts) + table(head, rows, rungs=True))


def _column(report: Report, name: str) -> dict[int, float]:
    return {size: getattr(cost, name) for size, cost in report.costs.items()}


def _share(report: Report, size: int) -> str:
    counts = _column(report, "parameters")
    return f"{counts[size] / max(1, max(counts.values())):.1%}"


def quality_section(report: Report) -> str:
    """Lines of each metric over sizes, and their table; nothing where no metrics were given."""
    if not report.metrics:
        return ""
    sizes = list(report.plan.sizes)
    series = list(dict.fromkeys(name for lines in report.metrics.values() for name in lines))
    charts = [
        figure(name, pictures.lines(lines, sizes, f"{name} by size") + _key(lines))
        for name, lines in list(report.metrics.items())[:MOST_CHARTS]
    ]
    rows = [
        (size, name, *(_metric(lines.get(name, {}).get(size)) for lines in report.metrics.values()))
        for name in series
        for size in sizes
    ]
    head = ("size", "series", *report.metrics)
    if series == [""]:
        head, rows = ("size", *report.metrics), [(row[0], *row[2:]) for row in rows]
    return section("What each size achieves", grid(charts) + table(head, rows))


def layer_section(report: Report) -> str:
    """The weight of one layer in its blocks."""
    plan = report.plan
    name = pictures.drawn_layer(plan)
    if name is None:
        return ""
    masked = (
        "Each block of outputs reads the inputs of its own size and of the smaller ones; "
        "what is left blank is never read."
    )
    sliced = "The model of a size is the top left corner: a prefix of the rows and of the columns."
    words = tag("figcaption", masked if plan.masked else sliced)
    drawn = tag("figure", pictures.weight(plan, name), _shades(plan), words, class_="narrow")
    return section(f"One layer: {name}", drawn)


def plan_section(report: Report) -> str:
    """Every group and its widths."""
    plan = report.plan
    head = ("group", "units", *plan.sizes, "parameters' axes")
    rows = [
        (g.name, g.size, *(w[i] for w in plan.ladder), ", ".join(g.parameters))
        for i, g in enumerate(plan.groups)
    ]
    words = tag(
        "p", "A bar is a group of axes that shrink together; the core is the smallest size."
    )
    drawn = tag("figure", pictures.groups(plan) + _shades(plan), class_="narrow")
    return section("What nests", words + drawn + folded("All groups", table(head, rows)))


def whole_section(report: Report) -> str:
    """What stays whole and why, ops without a rule, derived scalars, remarks."""
    plan = report.plan
    by_reason: dict[str, list[str]] = defaultdict(list)
    for axis in plan.whole:
        if axis.why != "no feature":
            by_reason[axis.why].append(f"{axis.axis} ({axis.size})")
    reasons = [(why, len(axes), _some(axes)) for why, axes in by_reason.items()]
    body = table(("why", "axes", "which"), reasons) if reasons else tag("p", "Nothing.")
    rest = (
        ("Ops without a rule: their axes stay whole", ("op", "node", "source"),
         [(u.op, u.node, u.source) for u in plan.unknown]),
        ("Constants derived from a width", ("node", "value", "source"),
         [(s.node, f"{s.value:.6g} = {s.units} ** {s.power:g}", s.source) for s in plan.scalars]),
        ("Remarks", ("remark",), [(remark,) for remark in plan.remarks]),
    )  # fmt: skip
    body += "".join(folded(title, table(head, rows)) for title, head, rows in rest if rows)
    return section("What stays whole, and why", body)


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _key(lines: Series) -> str:
    if list(lines) == [""]:
        return ""
    rows = (
        tag("span", tag("i", style=f"background:{pictures.colour(k)}"), escape(name))
        for k, name in enumerate(lines)
    )
    return tag("div", *rows, class_="key")


def _shades(plan: Plan) -> str:
    """Return the key of the levels: which shade is added by which size."""
    rows = (
        tag(
            "span",
            tag("i", class_="unit", style=f"opacity:{opacity(k, plan.levels):.2f}"),
            str(size),
        )
        for k, size in enumerate(plan.sizes)
    )
    return tag("div", *rows, class_="key")


def dial(report: Report) -> str:
    return "\n".join(
        tag(
            "label",
            f'<input type="radio" name="size" value="{size}" data-rung="{i}" '
            f'data-told="{escape(_told(size, report))}">',
            tag("span", str(size), class_="size"),
        )
        for i, size in enumerate(report.costs)
    )


def _told(size: int, report: Report) -> str:
    """Return one sentence about a size, read aloud when it is picked."""
    parts = [f"{form(getattr(report.costs[size], name))} {unit}" for name, form, unit in COSTS]
    quality = [
        f"{name} {line[size]:.4f}"
        for name, lines in list(report.metrics.items())[:2]
        for line in list(lines.values())[:1]
        if size in line
    ]
    return (
        f"Size {size}: {', '.join([*parts, *quality])}; {_share(report, size)} of all parameters."
    )
