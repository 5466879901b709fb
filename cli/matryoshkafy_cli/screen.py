"""What the commands print: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

FAILED = 2
STOPPED = 130
WIDTH = 80


class CommandError(ValueError):
    """What the user gave to a command cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Screen:
    """How much a command prints: quiet drops progress, json prints one JSON value instead."""

    quiet: bool = False
    json: bool = False

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show what is being done while it is done."""
        if self.quiet or self.json:
            yield
            return
        from rich.console import Console

        what = _printable(what)
        console = Console(stderr=True)
        if not console.is_terminal:
            console.print(what, highlight=False)
            yield
            return
        with console.status(what):
            yield

    def note(self, text: str) -> None:
        """Print a remark, unless quiet."""
        if not (self.quiet or self.json):
            print(_printable(text), file=sys.stderr)

    def result(self, value: Any, text: Callable[[], str]) -> None:
        """Print a result: the value as JSON, or the text that a person reads."""
        print(json.dumps(value, allow_nan=False) if self.json else _printable(text()))


def _printable(text: str) -> str:
    """Names out of files may hold what moves a cursor or turns a line around: shown as escapes."""
    from matryoshkafy.files.json_text import printable

    return printable(text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table as text; the first column left, the others right.

    The title is wrapped at the width of a screen, line by line; the table is not.
    """
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [_aligned(row, widths) for row in cells]
    return "\n".join([wrapped(title), "", lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def wrapped(text: str) -> str:
    """Return text of which no line is wider than a screen, where words allow it.

    A no-break space holds words together and is written as a space.
    """
    lines = (
        textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False,
                      break_on_hyphens=False)
        for line in text.splitlines()
    )  # fmt: skip
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def readable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command whose errors are one message on stderr and exit code 2, no traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _warnings_in_one_line():
                result = function(*args, **kwargs)
                sys.stdout.flush()
                return result
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            _stop_printing()
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(STOPPED) from None
        except Exception as error:  # noqa: BLE001  whatever it is, a person reads it
            if kwargs.get("debug"):
                raise
            print(_printable(f"error: {_message(error)}"), file=sys.stderr)
            raise typer.Exit(FAILED) from None

    return run


def _stop_printing() -> None:
    """Whoever read the output (head, less) has seen enough: the rest goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str:
    if isinstance(error, CommandError) or _is_ours(error):
        return str(error)
    kind, text = type(error).__name__, str(error).strip()[:600]
    return (
        f"unexpected {kind}: {text or 'no message'}\nThis is a fault of matryoshkafy or of a "
        "library below it. Run again with --debug to see where, and report it."
    )


def _is_ours(error: Exception) -> bool:
    module = sys.modules.get("matryoshkafy.errors")
    return module is not None and isinstance(error, module.MatryoshkafyError)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings of this library are lines on stderr; those of libraries below are left out."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.showwarning = _show
            yield
    finally:
        logging.disable(logging.NOTSET)


def heed(category: type[Warning]) -> None:
    """Let the warnings of a category through for the rest of the command."""
    warnings.simplefilter("always", category)


def _show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    del category, rest
    print(_printable(f"warning: {message}"), file=sys.stderr)


def import_all(names: Sequence[str] | None) -> None:
    """Import the modules that the user named; raises CommandError where one cannot be."""
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise CommandError(
                f"--import {name} was given, but it cannot be imported ({error}); expected a "
                "module that is installed here. Check the name, or install it."
            ) from error


def counted(value: float) -> str:
    """Return a count as the report says it: 110M."""
    from matryoshkafy.report.page import numbers

    return numbers.counted(value)


def stored(value: float) -> str:
    """Return bytes as the report says them: 438 MB."""
    from matryoshkafy.report.page import numbers

    return numbers.stored(value)


def timed(seconds: float) -> str:
    """Return a time as the report says it: 12.3 ms."""
    from matryoshkafy.report.page import numbers

    return numbers.timed(seconds)
