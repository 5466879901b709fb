"""The sections of a report, each a function of its contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from matryoshkafy.plan.folding import folded as fold
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.text import meaning, place_of, told, whole_rows
from matryoshkafy.report import pictures
from matryoshkafy.report.page.contents import Report
from matryoshkafy.report.page.html import beside, figure, folded, grid, section, table
from matryoshkafy.report.page.numbers import counted, stored, timed
from matryoshkafy.report.page.tradeoffs import key
from matryoshkafy.report.pictures.svg import opacity, tag

MOST_CHARTS = 12
MOST_ROWS = 60
# Drawings are this wide: three fit side by side, one fits a phone.
WIDE = 300
SIDE = 250
COSTS: tuple[tuple[str, Callable[[float], str], str], ...] = (
    ("parameters", counted, "parameters"),
    ("bytes", stored, "of weights"),
    ("flops", counted, "FLOPs"),
    ("latency", timed, "a call"),
)
TITLES = {"flops": "FLOPs"}
# Shapes up to this length stand beside the word latency; longer ones below the table.
SHORT = 24
MASKED = (
    "In the weight each block of outputs reads the inputs of its own size and of the smaller ones; "
    "what is left blank is never read."
)
SLICED = "Of the weight a size holds the top left corner: a prefix of the rows and of the columns."
DRAWN = ("parameters", "flops", "latency")


def costs_section(report: Report) -> str:
    """Bars of parameters, FLOPs and latency over sizes, and the table with bytes besides."""
    charts = [
        figure(
            _title(name, report),
            pictures.bars(_column(report, name), form, f"{name} by size", WIDE),
        )
        for name, form, _ in COSTS
        if name in DRAWN
    ]
    head = ("size", *(TITLES.get(name, name) for name, _, _ in COSTS), "share")
    rows = [
        (size, *(form(getattr(cost, name)) for name, form, _ in COSTS), _share(report, size))
        for size, cost in report.costs.items()
    ]
    inputs = (
        f"FLOPs and latency are of one call with inputs of {report.inputs}; the share is that of "
        "all parameters."
    )
    body = grid(charts) + table(head, rows, rungs=True)
    body += tag("p", escape(inputs), class_="soft") if report.inputs else ""
    return section("What each size costs", body)


def _title(name: str, report: Report) -> str:
    if name == "latency" and 0 < len(report.inputs) <= SHORT:
        return f"latency at {report.inputs}"
    return TITLES.get(name, name)


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
        figure(name, pictures.lines(lines, sizes, f"{name} by size", WIDE), key(lines))
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
    return section("What each size achieves", beside(charts, head, rows))


def plan_section(report: Report) -> str:
    """Every group and its widths, layers that repeat as one; and one layer's weight in blocks."""
    plan = report.plan
    head = ("group", "units", *plan.sizes, "parameters' axes")
    groups = (
        (g.name, str(g.size), *(str(w[i]) for w in plan.ladder), _members(g.parameters))
        for i, g in enumerate(plan.groups)
    )
    rows = fold(groups, plan.parameters)
    drawn = [figure("groups", pictures.groups(plan, wide=WIDE), _shades(plan)), *_layer(plan)]
    words = [tag("p", "A bar is a group of axes that shrink together, drawn for each size.")]
    words += [tag("p", MASKED if plan.masked else SLICED)] if len(drawn) > 1 else []
    shown = grid([*drawn, tag("div", *words, class_="fill soft")])
    return section("What nests", shown + folded("All groups", table(head, rows)))


def _layer(plan: Plan) -> Iterator[str]:
    """Yield the drawing of a weight, where one has both of its axes nested."""
    name = pictures.drawn_layer(plan)
    if name is None:
        return
    yield figure(name, pictures.weight(plan, name, SIDE), _shades(plan))


def _members(parameters: Sequence[str]) -> str:
    return _some([name for (name,) in fold((name,) for name in parameters)])


def whole_section(report: Report) -> str:
    """What stays whole and why, ops without a rule, derived scalars, remarks."""
    plan = report.plan
    rows = whole_rows(plan)
    head = ("axis", "size", "why", "where")
    body = table(head, rows[:MOST_ROWS]) if rows else tag("p", "Nothing.")
    body += tag("p", f"and {len(rows) - MOST_ROWS} more") if len(rows) > MOST_ROWS else ""
    body += _meanings({why for _, _, why, _ in rows})
    rest = (
        ("Ops without a rule: their axes stay whole", ("op", "where"),
         [(u.op, place_of(u.source) or u.node) for u in plan.unknown]),
        ("Constants derived from a width", ("value", "where"),
         list(dict.fromkeys((str(s), s.name) for s in plan.scalars))),
        ("Remarks", ("remark",), [(remark,) for remark in told(plan.remarks)]),
    )  # fmt: skip
    body += "".join(folded(title, table(head, rows)) for title, head, rows in rest if rows)
    return section("What stays whole, and why", body)


def _meanings(reasons: set[str]) -> str:
    told = sorted(f"{why}: {meaning(why)}" for why in reasons if meaning(why))
    return tag("p", escape("; ".join(told)), class_="soft") if told else ""


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


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
    """Return the row of sizes, one of which is picked."""
    sizes = "\n".join(
        tag(
            "label",
            f'<input type="radio" name="size" value="{size}" data-rung="{i}" '
            f'data-told="{escape(_told(size, report))}">',
            tag("span", str(size), class_="size"),
        )
        for i, size in enumerate(report.costs)
    )
    legend = tag("legend", "Size ", tag("span", "(arrow keys work)", class_="hint"))
    told = tag("output", id="told", aria_live="polite")
    return tag("form", tag("fieldset", legend, sizes), told, class_="dial", aria_label="Size")


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
