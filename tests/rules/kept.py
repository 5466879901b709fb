"""Rules that a test registers, forgotten at its end."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from matryoshkafy.graph.vocabulary import BASICS
from matryoshkafy.rules import OPS


@contextmanager
def rules_kept() -> Generator[None, None, None]:
    """Forget at the end of the block every rule that was registered inside it."""
    rows, basics = dict(OPS), dict(BASICS)
    try:
        yield
    finally:
        for table, before in ((OPS, rows), (BASICS, basics)):
            table.clear()
            table.update(before)
