"""matryoshkafy family: from a text encoder's folder to a family of sizes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from matryoshkafy_cli.options import Debug, Json, Output, Quiet
from matryoshkafy_cli.screen import CommandError, Screen

COLUMN = "--column"


def family(  # noqa: PLR0913  an option is a parameter
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="The folder of a transformers or sentence-transformers text encoder.",
            show_default=False,
        ),
    ],
    sizes: Annotated[str, typer.Option("--sizes", help='"96..384", "96,192,384" or "0.5,1".')],
    data: Annotated[
        Path,
        typer.Option("--data", help="Texts: .txt (one a line), .jsonl or .parquet."),
    ],
    output: Output,
    column: Annotated[
        list[str] | None,
        typer.Option(COLUMN, help="A column with texts (.jsonl, .parquet). May repeat."),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of distillation; 0: ordered slices alone.")
    ] = 300,
    length: Annotated[int, typer.Option("--length", help="Tokens of a text that are read.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of the training.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a family of sizes out of a pretrained text encoder: ordered, distilled, written.

    The units are rotated or ordered by importance, every size learns from the full model, and each
    size is written as a folder of the encoder's own class. A killed run goes on where it was.
    """
    screen = Screen(quiet, json)
    with screen.step(f"reading {data}"):
        texts = _texts(data, column or [])
        from matryoshkafy_cli.families import Task, make, shown

        output.mkdir(parents=True, exist_ok=True)
    task = Task(model, sizes, tuple(texts), steps, length, output, seed)
    rows = make(task, screen.step)
    screen.result({"sizes": [asdict(row) for row in rows]}, lambda: shown(rows, output))


def _texts(path: Path, columns: list[str]) -> list[str]:
    """Return the texts of a file."""
    if not path.is_file():
        raise CommandError(
            f"--data {path} was given, but there is no such file; expected .txt, .jsonl or "
            ".parquet. Check the path."
        )
    if path.suffix == ".txt":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix not in (".jsonl", ".parquet"):
        raise CommandError(
            f"--data {path} was given; expected .txt (one text a line), .jsonl or .parquet. "
            "Convert it."
        )
    return _columns(path, columns)


def _columns(path: Path, columns: list[str]) -> list[str]:
    try:
        import polars
    except ImportError as error:
        raise CommandError(
            f"reading {path} needs polars: pip install polars, or give a .txt file"
        ) from error
    frame = polars.read_parquet(path) if path.suffix == ".parquet" else polars.read_ndjson(path)
    known = [name for name, kind in frame.schema.items() if kind == polars.String]
    wanted = columns or known
    if not wanted or not set(wanted) <= set(known):
        raise CommandError(
            f"{COLUMN} {', '.join(columns) or '(all)'} was asked of {path}, whose columns of text "
            f"are {', '.join(known) or 'none'}. Name one of these."
        )
    return [text for name in wanted for text in frame[name].drop_nulls().to_list()]
