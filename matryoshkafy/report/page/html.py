"""The pieces of HTML that the page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from matryoshkafy.report.pictures.svg import tag

Rows = Iterable[Sequence[object]]


def section(title: str, body: str) -> str:
    """Return a section under a heading."""
    return tag("section", tag("h2", escape(title)), body)


def figure(title: str, drawing: str) -> str:
    """Return a titled drawing."""
    return tag("figure", tag("h3", escape(title)), drawing)


def grid(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as fit."""
    return tag("div", *figures, class_="grid")


def folded(title: str, body: str) -> str:
    """Return what opens on demand."""
    return tag("details", tag("summary", escape(title)), body)


def table(head: Sequence[object], rows: Rows, rungs: bool = False) -> str:
    """Return a table that scrolls sideways where it must; with `rungs` row k belongs to level k."""
    lines = [list(map(str, row)) for row in rows]
    words = [any(not _is_numeric(line[i]) for line in lines) for i in range(len(head))]
    top = tag("tr", *(_cell("th", h, w, scope="col") for h, w in zip(head, words, strict=True)))
    body = [
        tag("tr", *map(_cell, ["td"] * len(line), line, words), data_rung=i if rungs else None)
        for i, line in enumerate(lines)
    ]
    whole = tag("table", tag("thead", top), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=str(head[0]))


def _cell(name: str, value: object, words: bool, **attributes: object) -> str:
    return tag(name, escape(str(value)), class_="words" if words else None, **attributes)


def _is_numeric(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] == "-"
