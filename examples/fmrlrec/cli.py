"""The command line: each command parses, calls one stage, prints. Torch is imported inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from examples.fmrlrec.config import Config, parse_settings, preset, replace
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
    typer.Option("--preset", help="paper, synthetic, beauty or ml-1m; by the data if not given."),
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
    if stored.exists():
        config = Config.from_json(stored.read_text(encoding="utf-8"))
    else:
        config = preset(name or default_preset(data))
    given = {"data": data, "sizes": sizes, **parse_settings(settings or [])}
    return replace(config, {key: value for key, value in given.items() if value is not None})


def default_preset(data: str | None) -> str:
    """Small settings where there is no GPU: the paper's take days on a CPU."""
    if data in (None, "synthetic"):
        return "synthetic"
    import torch

    if torch.cuda.is_available():
        return "paper"
    return "beauty" if Path(str(data)).is_file() else "ml-1m"


def _open(folder: Path, *given: Any) -> Any:
    from examples.fmrlrec.pipeline import open_run

    return open_run(folder, configure(folder, *given))


@app.command("prepare")
def prepare_command(
    run: RunFolder = DEFAULT_RUN,
    data: Data = None,
    preset: Preset = None,
    sizes: Sizes = None,
    set: Settings = None,
) -> None:
    """Read, filter (5-core) and order the interactions; print their statistics."""
    from examples.fmrlrec import pipeline

    pipeline.prepare(_open(run, data, preset, sizes, set))


@app.command("encode")
def encode_command(
    run: RunFolder = DEFAULT_RUN,
    data: Data = None,
    preset: Preset = None,
    sizes: Sizes = None,
    set: Settings = None,
) -> None:
    """Encode texts and pictures of the items, or find them in the cache."""
    from examples.fmrlrec import pipeline

    material = pipeline.materials(_open(run, data, preset, sizes, set))
    for name, vectors in material.features.vectors.items():
        print(f"{name}: {vectors.shape[0] - 1} items x {vectors.shape[1]}")


@app.command("train")
def train_command(
    run: RunFolder = DEFAULT_RUN,
    data: Data = None,
    preset: Preset = None,
    sizes: Sizes = None,
    set: Settings = None,
) -> None:
    """Train the nested model once (a killed run goes on) and write every size as a file."""
    from examples.fmrlrec import pipeline

    opened = _open(run, data, preset, sizes, set)
    pipeline.train_nested(opened, pipeline.materials(opened))


@app.command("evaluate")
def evaluate_command(run: RunFolder = DEFAULT_RUN) -> None:
    """Rank all items on the test set, for the doll and for each sliced file."""
    from examples.fmrlrec import pipeline

    opened = _open(run, None, None, None, None)
    pipeline.evaluate_all(opened, pipeline.materials(opened))


@app.command("ablate")
def ablate_command(
    run: RunFolder = DEFAULT_RUN,
    modality: Annotated[list[str] | None, typer.Option(help="Which to train; all four.")] = None,
) -> None:
    """Train with text and pictures, with either, and with neither."""
    from examples.fmrlrec import pipeline
    from examples.fmrlrec.ablation import ablate
    from examples.fmrlrec.config import MODALITIES

    opened = _open(run, None, None, None, None)
    ablate(opened, pipeline.materials(opened), modality or MODALITIES)


@app.command("compare")
def compare_command(
    run: RunFolder = DEFAULT_RUN,
    size: Annotated[list[int] | None, typer.Option(help="Which to train alone; all.")] = None,
) -> None:
    """Train every size alone with the same recipe; print and plot nested against alone."""
    from examples.fmrlrec import pipeline
    from examples.fmrlrec.building import sizes_of
    from examples.fmrlrec.comparison import compare

    opened = _open(run, None, None, None, None)
    material = pipeline.materials(opened)
    nested = pipeline.evaluate_nested(opened, material, pipeline.trained_doll(opened, material))
    compare(opened, material, nested, size or list(sizes_of(opened.config)))


@app.command("memory")
def memory_command(run: RunFolder = DEFAULT_RUN, sizes: Sizes = None) -> None:
    """Parameters and peak training memory of one nested model against all sizes alone."""
    from examples.fmrlrec.memory import report_memory

    opened = _open(run, None, None, None, None)
    report_memory(opened, sizes or opened.config.sizes)


@app.command("recommend")
def recommend_command(
    items: Annotated[list[str] | None, typer.Argument(help="A sequence of item ids.")] = None,
    user: Annotated[str | None, typer.Option(help="A user id of the data, instead.")] = None,
    run: RunFolder = DEFAULT_RUN,
    count: Annotated[int, typer.Option(help="How many to recommend.")] = 10,
) -> None:
    """Print the next items of a user, or after a sequence, at each size."""
    from examples.fmrlrec import pipeline, recommending
    from examples.fmrlrec.reporting import print_sheet

    opened = _open(run, None, None, None, None)
    material = pipeline.materials(opened)
    history = (
        recommending.history_from(material, items or [])
        if user is None
        else recommending.history_of(material, user)
    )
    doll = pipeline.trained_doll(opened, material)
    length = opened.config.max_length
    print_sheet(recommending.recommend(doll, material, history, count=count, length=length))


@app.command("run")
def run_command(
    run: RunFolder = DEFAULT_RUN,
    data: Data = None,
    preset: Preset = None,
    sizes: Sizes = None,
    set: Settings = None,
) -> None:
    """Do all of it; `compare` only under --set alone=true, since it trains each size again."""
    from examples.fmrlrec.everything import run_everything

    run_everything(_open(run, data, preset, sizes, set))


def main() -> None:
    """Runs the command line; an error that a person can mend is one message and exit code 2."""
    try:
        app()
    except MatryoshkafyError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
