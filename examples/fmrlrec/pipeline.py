"""The stages of a run, each a function of the run folder; what is there already is not redone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.fmrlrec import data, encoders, formats, synthetic
from examples.fmrlrec.building import build, nest, sizes_of
from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.errors import RunError
from examples.fmrlrec.evaluation import (
    Table,
    evaluate,
    module_scorer,
    popularity_scorer,
)
from examples.fmrlrec.objectives import NestedObjective, PlainObjective, nested_scorer
from examples.fmrlrec.reporting import Sheet, metric_sheet, write_environment, write_sheet
from examples.fmrlrec.training import STATE, Progress, load_tensors, load_weights, train

# What may differ between two calls on one run folder: it changes no result that is there already.
ADJUSTABLE = {"epochs", "patience", "checkpoint_steps", "eval_batch", "encoder_batch", "alone"}


@dataclass(frozen=True)
class Run:
    """A run folder and its configuration."""

    folder: Path
    config: Config

    def variant(self, name: str, **changes: Any) -> Run:
        """The same run under other settings, in a folder of its own below this one."""
        return Run(self.folder / name, replace(self.config, changes))


@dataclass(frozen=True)
class Material:
    """What the models of a run are trained on."""

    data: data.Dataset
    features: encoders.Features


def open_run(folder: Path, config: Config) -> Run:
    """Opens a run folder; raises `RunError` where it holds a run of another configuration."""
    stored = folder / "config.json"
    if stored.exists():
        before = dataclasses.asdict(Config.from_json(stored.read_text(encoding="utf-8")))
        after = dataclasses.asdict(config)
        changed = [n for n in before if before[n] != after[n] and n not in ADJUSTABLE]
        if changed:
            told = ", ".join(f"{n}={after[n]!r} (there: {before[n]!r})" for n in changed)
            raise RunError(f"{folder} holds a run with other settings: {told}; use another --run")
    write_environment(config, folder)
    return Run(folder, config)


def prepare(run: Run) -> data.Dataset:
    """Reads, filters and orders the interactions, and tells the counts and what was wrong."""
    folder = run.folder / "data"
    if not (folder / data.REPORT).exists():
        source = formats.read(_data_path(run), folder / "lines")
        data.prepare(source, folder, run.config)
    prepared = data.load(folder)
    counts = tuple(data.statistics(prepared).items())
    write_sheet(Sheet("Data", ("what", "count"), counts), run.folder / "tables", "data")
    _tell_problems(prepared.report["problems"])
    return prepared


def encode(run: Run, prepared: data.Dataset) -> encoders.Features:
    """Encodes texts and pictures, or finds them in the cache, and tells what was missing."""
    found = encoders.encode(prepared.catalogue, run.config, run.folder / "cache")
    _tell_problems(found.problems)
    return found


def materials(run: Run) -> Material:
    """Prepared data and features of a run."""
    prepared = prepare(run)
    return Material(prepared, encode(run, prepared))


def with_all_features(run: Run, material: Material) -> Material:
    """The same material with the features of every modality, for the ablation."""
    return Material(material.data, encode(run.variant(".", modality="both"), material.data))


def train_nested(run: Run, material: Material) -> Any:
    """Trains the nested model (or goes on, or finds it finished) and returns it, best weights in.

    The doll and each of its sizes are saved as standalone checkpoints.
    """
    doll = new_doll(run, material)
    train(NestedObjective(doll, run.config), material.data, run.config, run.folder / "nested")
    save_slices(run, doll)
    return doll


def train_alone(run: Run, material: Material, size: int) -> Progress:
    """Trains a plain model of one size with the same recipe."""
    model = build(run.config, material.data.item_count, material.features, size)
    folder = run.folder / "alone" / str(size)
    return train(PlainObjective(model, run.config), material.data, run.config, folder)


def new_doll(run: Run, material: Material) -> Any:
    """The untrained nested model of a run."""
    width = sizes_of(run.config)[-1]
    model = build(run.config, material.data.item_count, material.features, width)
    return nest(model, run.config)


def trained_doll(run: Run, material: Material) -> Any:
    """The nested model with its best weights; raises `RunError` before `train`."""
    doll = new_doll(run, material)
    load_weights(doll, run.folder / "nested" / "best.safetensors")
    return doll.eval()


def save_slices(run: Run, doll: Any) -> list[Path]:
    """Writes the doll to `checkpoint/` and each size to `slices/<size>/`; returns the latter."""
    import matryoshkafy as mk

    doll.eval()
    mk.save(doll, run.folder / "checkpoint", force=True)
    folders = []
    for size in doll.sizes:
        folders.append(run.folder / "slices" / str(size))
        mk.save(mk.slice(doll, size), folders[-1], force=True)
    return folders


def evaluate_nested(run: Run, material: Material, doll: Any) -> dict[str, Table]:
    """Test metrics of every size in one pass, with popularity as the floor."""
    device = _device()
    counts = data.popularity(material.data)
    config = run.config
    with torch.inference_mode():
        floor = evaluate(popularity_scorer(counts), material.data, "test", config)
        scorer = nested_scorer(doll.to(device).eval())
        found = evaluate(scorer, material.data, "test", config, device=device)
    return {**floor, **found}


def evaluate_slices(run: Run, material: Material) -> dict[str, Table]:
    """Test metrics of each sub-model, loaded from its own file: these are what ships."""
    import matryoshkafy as mk

    found: dict[str, Table] = {}
    for folder in _numbered(run.folder / "slices"):
        model = mk.load(folder).to(_device()).eval()
        scorer = module_scorer(model, folder.name)
        with torch.inference_mode():
            found |= evaluate(scorer, material.data, "test", run.config, device=_device())
    return found


def evaluate_alone(run: Run, material: Material) -> dict[str, Table]:
    """Test metrics of the plain models that `compare` trained."""
    found: dict[str, Table] = {}
    for folder in _numbered(run.folder / "alone"):
        model = build(run.config, material.data.item_count, material.features, int(folder.name))
        load_weights(model, folder / "best.safetensors")
        scorer = PlainObjective(model.to(_device()).eval(), run.config).scorer
        with torch.inference_mode():
            found |= evaluate(scorer(), material.data, "test", run.config, device=_device())
    return found


def evaluate_all(run: Run, material: Material) -> dict[str, Table]:
    """Evaluates doll and slices, writes both tables, tells how far they differ; the doll's."""
    found = evaluate_nested(run, material, trained_doll(run, material))
    write_sheet(metric_sheet("Test, every size", found), run.folder / "tables", "nested")
    sliced = evaluate_slices(run, material)
    write_sheet(metric_sheet("Test, sliced files", sliced), run.folder / "tables", "slices")
    gap = largest_gap(found, sliced)
    print(f"largest difference between the doll and its sliced files: {gap:.2e}")
    return found


def largest_gap(one: dict[str, Table], other: dict[str, Table]) -> float:
    """The largest absolute difference of two sets of metrics over the sizes of `other`."""
    return max(
        abs(one[size][protocol][metric] - value)
        for size, table in other.items()
        for protocol, metrics in table.items()
        for metric, value in metrics.items()
    )


def seconds_per_epoch(folder: Path) -> float:
    """Mean time of an epoch of a finished or unfinished training."""
    _, metadata = load_tensors(folder / STATE)
    history = json.loads(metadata["progress"])["history"]
    return sum(row["seconds"] for row in history) / max(1, len(history))


def _numbered(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob("*") if path.name.isdigit()]
    if not found:
        raise RunError(f"nothing in {folder}; run `train` (slices) or `compare` (alone) first")
    return iter(sorted(found, key=lambda path: int(path.name)))


def _data_path(run: Run) -> Path:
    if run.config.data != "synthetic":
        return Path(run.config.data)
    shop = run.folder / "shop"
    if not (shop / "interactions.csv").exists():
        synthetic.generate(shop, synthetic.Shop(seed=run.config.seed))
    return shop


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tell_problems(problems: Any) -> None:
    for name, count in _largest(problems.items()):
        print(f"note: {name}: {count}")


def _largest(items: Iterable[tuple[str, int]], limit: int = 20) -> list[tuple[str, int]]:
    return sorted(items, key=lambda item: -item[1])[:limit]
