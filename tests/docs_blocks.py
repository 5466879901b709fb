"""The Python and shell blocks of a Markdown page, each with its place, ready to be executed.

The Python blocks of one page share a namespace and run top to bottom, as a reader would type them.
A failure shows the page's own line in its traceback: blocks are compiled under the page's name
at their line. A block is not executed where the line above it is `<!-- not executed: reason -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,})(?P<info>[^`]*)$")
SKIP = re.compile(r"<!--\s*not executed: (?P<reason>.+?)\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line of the page on which the text starts."""

    page: Path
    line: int
    language: str
    text: str
    skipped: str = ""


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return list(_blocks(page, lines))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    start = 0
    while start < len(lines):
        fence = FENCE.match(lines[start])
        if fence is None:
            start += 1
            continue
        end = _closing(lines, start, fence["ticks"])
        indent = len(fence["indent"])
        text = "\n".join(line[indent:] for line in lines[start + 1 : end]) + "\n"
        info = fence["info"].split()
        yield Block(page, start + 2, info[0] if info else "", text, _skip(lines, start))
        start = end + 1


def _closing(lines: list[str], start: int, ticks: str) -> int:
    for number in range(start + 1, len(lines)):
        if lines[number].strip() == ticks:
            return number
    raise ValueError(f"line {start + 1}: the block is never closed; add {ticks}")


def _skip(lines: list[str], start: int) -> str:
    above = next((line for line in reversed(lines[:start]) if line.strip()), "")
    found = SKIP.search(above)
    return found["reason"] if found else ""


def code_of(block: Block) -> str:
    """Return the text of a block moved down to its own line, so that tracebacks point there."""
    return "\n" * (block.line - 1) + block.text
