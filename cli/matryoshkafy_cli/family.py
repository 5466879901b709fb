"""matryoshkafy family: from a pretrained model to a family of sizes."""

from __future__ import annotations

from json import loads as parse
from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Json, Output, Quiet, Weights
from matryoshkafy_cli.screen import CommandError, Screen

COLUMN = "--column"


def family(  # noqa: PLR0913  an option is a parameter
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder of transformers or sentence-transformers (a text encoder or a causal "
            "language model), timm:NAME[:pretrained] or open_clip:NAME[:TAG].",
            show_default=False,
        ),
    ],
    sizes: Annotated[str, typer.Option("--sizes", help='"96..384", "96,192,384" or "0.5,1".')],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Texts: .txt (one a line), .jsonl or .parquet. Pictures: a folder of them.",
        ),
    ],
    output: Output,
    column: Annotated[
        list[str] | None,
        typer.Option(COLUMN, help="A column with texts (.jsonl, .parquet). May repeat."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="QUERY:DOCUMENT",
            help="Two columns: how well a row's query finds its document is measured too.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of distillation; 0: ordered and refitted slices.")
    ] = 300,
    length: Annotated[
        int, typer.Option("--length", min=2, help="Tokens of a text that are read.")
    ] = 64,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Give a head that is the table of tokens a weight of its own, so that the stream "
            "can be rotated; every size grows by the table.",
        ),
    ] = False,
    weights: Weights = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of the training.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Where to distil: cpu, cuda, cuda:1, mps; cuda where there is one.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a family of sizes out of a pretrained model: ordered, distilled, written.

    The units are rotated or ordered by importance, every size learns from the full model, and each
    size is written as a folder of the model's own class. A killed run goes on where it was. Without
    steps, every size gets weights of its own that are fitted to the full model layer by layer.
    """
    screen = Screen(quiet, json)
    with screen.step(f"reading {data}"):
        subject = _subject(model, data, (column or [], task), (length, seed), weights)
        from matryoshkafy_cli.families import Task, chosen_device, make, shown

        place = chosen_device(device)
        output.mkdir(parents=True, exist_ok=True)
    rows = make(subject, Task(sizes, steps, output, seed, untie, place), screen.step)
    screen.result({"sizes": [row.as_json() for row in rows]}, lambda: shown(rows, output))


def _subject(
    model: str,
    data: Path,
    columns: tuple[list[str], str | None],
    how: tuple[int, int],
    weights: Path | None,
) -> Any:
    """Return the model with what it reads, by the kind of the model."""
    (named, task), (length, seed) = columns, how
    pictured = model.startswith(("timm:", "open_clip:"))
    if task is not None and (pictured or is_causal(Path(model))):
        raise CommandError(
            f"--task {task} was given for {model}; expected it with a text encoder. Leave it out: "
            "pictures are judged by their folders, language models by their perplexity."
        )
    if pictured:
        from matryoshkafy_cli.family_images import pictures_subject

        return pictures_subject(model, weights, data, seed)
    if weights is not None:
        raise CommandError(
            f"--weights {weights} was given for a folder, which has its own; expected it with "
            "timm:NAME or open_clip:NAME. Leave it out."
        )
    if is_causal(Path(model)):
        from matryoshkafy_cli.family_tokens import tokens_subject

        return tokens_subject(Path(model), _texts(data, named), length, seed)
    from matryoshkafy_cli.family_texts import texts_subject

    rows = _texts(data, named) if task is None else _pairs(data, task)
    return texts_subject(Path(model), rows, length, seed)


def is_causal(folder: Path) -> bool:
    """Whether a folder's config names a causal language model."""
    path = folder / "config.json"
    named = parse(path.read_text("utf-8")).get("architectures") if path.is_file() else None
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named or [])


def _pairs(path: Path, task: str) -> list[tuple[str, str]]:
    """Return the rows of the two columns of a task."""
    query, _, document = task.partition(":")
    if path.suffix not in (".jsonl", ".parquet") or not query or not document:
        raise CommandError(
            f"--task {task} was given with --data {path}; expected QUERY:DOCUMENT, two columns of "
            "a .jsonl or .parquet. Name two."
        )
    frame = _frame(path)
    names = _known([query, document], frame, path, "--task")
    return list(frame.select(names).drop_nulls().iter_rows())


def _texts(path: Path, columns: list[str]) -> list[str]:
    """Return the texts of a file."""
    _check_there(path)
    if path.suffix == ".txt":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix not in (".jsonl", ".parquet"):
        raise CommandError(
            f"--data {path} was given; expected .txt (one text a line), .jsonl or .parquet. "
            "Convert it."
        )
    frame = _frame(path)
    wanted = _known(columns, frame, path, COLUMN)
    return [text for name in wanted for text in frame[name].drop_nulls().to_list()]


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise CommandError(
            f"--data {path} was given, but there is no such file; expected .txt, .jsonl or "
            ".parquet. Check the path."
        )


def _frame(path: Path) -> Any:
    _check_there(path)
    try:
        import polars
    except ImportError as error:
        raise CommandError(
            f"reading {path} needs polars: pip install polars, or give a .txt file"
        ) from error
    return polars.read_parquet(path) if path.suffix == ".parquet" else polars.read_ndjson(path)


def _known(columns: list[str], frame: Any, path: Path, option: str) -> list[str]:
    """Return the columns asked for, all of text where none is."""
    known = [name for name, kind in frame.schema.items() if str(kind) == "String"]
    wanted = columns or known
    if not wanted or not set(wanted) <= set(known):
        raise CommandError(
            f"{option} {', '.join(columns) or '(all)'} was asked of {path}, whose columns of text "
            f"are {', '.join(known) or 'none'}. Name one of these."
        )
    return wanted
