"""The commands by name. A command is a file; torch is imported inside the commands only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from matryoshkafy_cli.cascading import cascade
from matryoshkafy_cli.converting import convert
from matryoshkafy_cli.describing import info
from matryoshkafy_cli.exporting import export
from matryoshkafy_cli.family import family
from matryoshkafy_cli.inspecting import inspect
from matryoshkafy_cli.packing import pack
from matryoshkafy_cli.reporting import report
from matryoshkafy_cli.retrieving import retrieve
from matryoshkafy_cli.screen import readable
from matryoshkafy_cli.slicing import slice_
from matryoshkafy_cli.verifying import verify

COMMANDS: Mapping[str, Callable[..., Any]] = {
    "inspect": inspect,
    "convert": convert,
    "slice": slice_,
    "pack": pack,
    "verify": verify,
    "info": info,
    "export": export,
    "report": report,
    "retrieve": retrieve,
    "cascade": cascade,
    "family": family,
}
HELP = (
    "Make any PyTorch model a matryoshka doll: train once, deploy any size.\n\n"
    "A MODEL is a Python file (model.py or model.py:build), package.module:factory, a local "
    "transformers folder, timm:NAME or open_clip:NAME. Naming a Python file or module RUNS ITS "
    "CODE: name only what you trust. A CHECKPOINT is a folder that convert or slice wrote; reading "
    "one runs no code of it. slice only cuts its weights; info, verify, export and report "
    "COMPUTE WITH ITS GRAPH, out of known operators: for as long, and with as much memory, as the "
    "graph asks for."
)


def _print_version(asked: bool) -> None:
    if asked:
        import matryoshkafy

        print(f"matryoshkafy {matryoshkafy.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
]


def _whole(version: Version = False) -> None:
    """What stands before a command."""


def app() -> typer.Typer:
    """Return the application, with every command of the table."""
    made = typer.Typer(
        name="matryoshkafy",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    made.callback(help=HELP)(_whole)
    for name, function in COMMANDS.items():
        made.command(name, help=_help(function))(readable(function))
    return made


def _help(function: Callable[..., Any]) -> str:
    """Return a docstring with each paragraph in one line, which the terminal breaks by itself."""
    paragraphs = (function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def main() -> None:
    """Run the command line of this process."""
    app()(prog_name="matryoshkafy")
