"""The pieces of HTML that the page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from matryoshkafy.report.pictures.svg import sized, tag

Rows = Iterable[Sequence[object]]
# Figures in a row where there is room.
ACROSS = 3
# Columns of a table that have room where a figure could stand.
COLUMNS = 3


def section(title: str, body: str) -> str:
    """Return a section under a heading."""
    return tag("section", tag("h2", escape(title)), body)


def figure(title: str, drawing: str, *rest: str) -> str:
    """Return a titled drawing, and what belongs under it; a long name breaks after its dots."""
    return tag("figure", tag("h3", escape(title).replace(".", ".<wbr>")), sized(drawing), *rest)


def grid(figures: Iterable[str]) -> str:
    """Return figures side by side, in rows that leave none of them alone."""
    shown = list(figures)
    alone = len(shown) % ACROSS == 1 and len(shown) > 1
    kind = "grid pairs" if alone and len(shown) % 2 == 0 else "grid"
    return tag("div", *shown, class_=kind)


def beside(figures: Iterable[str], head: Sequence[object], rows: Rows) -> str:
    """Return figures and their table: in what their last row leaves free, where it fits there."""
    shown, drawn = list(figures), table(head, rows)
    free = -len(shown) % ACROSS
    if not free or len(head) > COLUMNS * free:
        return grid(shown) + drawn
    fill = tag("div", drawn, class_="fill two" if free > 1 else "fill")
    return tag("div", *shown, fill, class_="grid")


def folded(title: str, body: str) -> str:
    """Return what opens on demand."""
    return tag("details", tag("summary", escape(title)), body)


def table(head: Sequence[object], rows: Rows, rungs: bool = False) -> str:
    """Return a table: of numbers, scrolled sideways where it must with its first column in place;
    of words, on a phone, each row as a block of its own. With `rungs` row k belongs to level k.
    """
    lines = [list(map(str, row)) for row in rows]
    words = [any(not _is_numeric(line[i]) for line in lines) for i in range(len(head))]
    top = tag("tr", *(_cell("th", (h, w), scope="col") for h, w in zip(head, words, strict=True)))
    titles = list(map(str, head))
    body = [
        tag("tr", *_cells(line, words, titles), data_rung=i if rungs else None)
        for i, line in enumerate(lines)
    ]
    whole = tag("table", tag("thead", top), tag("tbody", *body))
    kind = "scroll stack" if sum(words) > 1 else "scroll"
    return tag("div", whole, class_=kind, tabindex=0, role="region", aria_label=str(head[0]))


def _cells(line: Sequence[str], words: Sequence[bool], titles: Sequence[str]) -> Iterable[str]:
    for value, worded, title in zip(line, words, titles, strict=True):
        yield _cell("td", (value, worded), data_title=title)


def _cell(name: str, shown: tuple[object, bool], **attributes: object) -> str:
    value, worded = shown
    return tag(name, escape(str(value)), class_="words" if worded else None, **attributes)


def _is_numeric(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] == "-"
