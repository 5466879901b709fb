"""The stages of a run, each a function of the run folder; what is there already is not redone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

import matryoshkafy as mk
from examples.fmrlrec import data, encoders, formats, nesting, synthetic
from examples.fmrlrec.config import Config, DataError, RunError, replace, write_text
from examples.fmrlrec.evaluation import Scorer, Table, evaluate, module_scorer, popularity_scorer
from examples.fmrlrec.nesting import nested_scorer, objective, sizes_of
from examples.fmrlrec.reporting import metric_table, write_environment, write_table
from examples.fmrlrec.training import BEST, load_weights, train
from examples.fmrlrec.workers import device, each_of, first_process_first

INPUTS, NESTED = "inputs.json", "nested"
LEARNT = ("nested", "alone", "ablation", "slices", "checkpoint", "serving", "tables", "plots")
# What may differ between two calls on one run folder: it changes no result that is there already.
ADJUSTABLE = (
    "epochs", "patience", "checkpoint_steps", "eval_batch", "encoder_batch", "workers", "alone",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder and its configuration."""

    folder: Path
    config: Config

    def variant(self, name: str, **changes: object) -> Run:
        """The same run under other settings, in a folder of its own below this one."""
        return Run(self.folder / name, replace(self.config, changes))


@dataclass(frozen=True)
class Material:
    """What the models of a run are trained on."""

    data: data.Dataset
    features: encoders.Features


def open_run(folder: Path, config: Config) -> Run:
    """Opens a run folder; raises `RunError` where it holds a run of another configuration.

    What can be told of a wrong setting is told here, before any work starts.
    """
    stored = folder / "config.json"
    if stored.exists():
        before = Config.from_json(stored.read_text(encoding="utf-8")).model_dump()
        after = config.model_dump()
        changed = [n for n in before if before[n] != after[n] and n not in ADJUSTABLE]
        if changed:
            told = ", ".join(f"{n}={after[n]!r} (there: {before[n]!r})" for n in changed)
            raise RunError(f"{folder} holds a run with other settings: {told}; use another --run")
    check(config)
    write_environment(config, folder)
    return Run(folder, config)


def check(config: Config) -> None:
    """Raises `ConfigError` or `DataError` for what cannot work, without reading any data."""
    sizes = sizes_of(config)
    nesting.per_size(config, "weights", sizes)
    nesting.intervals(config, sizes)
    encoders.check(config)
    if config.data != "synthetic" and not Path(config.data).exists():
        raise DataError(f"no data at {config.data}; give a folder or a file, or --data synthetic")


# Data and features.


def prepare(run: Run) -> data.Dataset:
    """Reads, filters and orders the interactions, and tells the counts and what was wrong.

    Prepared data are used again while the input files are the same; where they changed, that is
    said, they are prepared again, and what was learnt from the old ones is put aside.
    """
    folder = run.folder / "data"
    changed, digests = _changed(run)
    there = data.is_prepared(folder)
    if there and changed:
        print(f"note: {changed} changed since it was prepared; prepared again")
        _put_aside(run)
    if changed or not there:
        (folder / data.REPORT).unlink(missing_ok=True)
        source = formats.read(data_path(run), folder / "lines")
        data.prepare(source, folder, run.config, each_of(run.config))
    write_text(folder / INPUTS, json.dumps(digests, indent=0))
    found = data.load(folder)
    counts = data.statistics(found)
    table = pl.DataFrame({"what": [*counts], "count": [*map(str, counts.values())]})
    write_table(table, "Data", run.folder / "tables/data")
    _tell_problems(found.problems)
    return found


def materials(run: Run) -> Material:
    """Prepared data, and texts and pictures encoded or found in the cache."""
    with first_process_first():
        found, cache = prepare(run), run.folder / "cache"
        features = encoders.encode(found.catalogue, run.config, cache, each_of(run.config))
    for name, vectors in features.vectors.items():
        print(f"{name}: {len(vectors) - 1} items x {vectors.shape[1]}")
    _tell_problems(features.problems)
    return Material(found, features)


def prepared(run: Run) -> Material:
    """Data and features as they were prepared, without a word; changed input files are said."""
    found = data.load(run.folder / "data")
    changed, _ = _changed(run)
    if changed:
        print(f"note: {changed} changed since; `run` or `train` prepares and learns again")
    return Material(found, encoders.encode(found.catalogue, run.config, run.folder / "cache"))


def data_path(run: Run) -> Path:
    """Where the data of a run lie; the embedded shop is made where it is not there yet."""
    if run.config.data != "synthetic":
        return Path(run.config.data)
    shop = run.folder / "shop"
    if not (shop / "interactions.csv").exists():
        synthetic.generate(shop, synthetic.Shop(seed=run.config.seed))
    return shop


def _changed(run: Run) -> tuple[str, formats.Digests]:
    """The files that differ from those that were prepared, are new or are gone; all digests."""
    stored = run.folder / "data" / INPUTS
    before = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    now = formats.digests(data_path(run), before, run.folder)
    names = {*before, *now} if before else set()
    changed = [n for n in sorted(names) if before.get(n, [""])[-1] != now.get(n, [""])[-1]]
    more = f" and {len(changed) - 3} more files" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more, now


def _put_aside(run: Run) -> None:
    """Items have other numbers now: weights of the old ones would be silently wrong."""
    earlier = sum(1 for _ in run.folder.glob("before-*"))
    target = run.folder / f"before-{earlier + 1}"
    for name in LEARNT:
        if (run.folder / name).exists():
            target.mkdir(exist_ok=True)
            (run.folder / name).rename(target / name)
    if target.exists():
        print(f"note: what was learnt from the old data now lies in {target}")


def _tell_problems(problems: Mapping[str, int]) -> None:
    """The twenty most frequent."""
    for name, count in sorted(problems.items(), key=lambda item: -item[1])[:20]:
        print(f"note: {name}: {count}")


# Training.


def learn(run: Run, material: Material) -> mk.Doll:
    """The nested model with its best weights: trained, gone on with, or found finished."""
    learning = objective(new_doll(run, material), run.config)
    train(learning, material.data, run.config, run.folder / NESTED)
    # Anew: several processes have sharded what they trained.
    return trained_doll(run, material)


def train_nested(run: Run) -> Material:
    """Trains the nested model, saves it to `checkpoint/`, and each size to `slices/<size>/`."""
    material = materials(run)
    doll = learn(run, material)
    mk.save(doll, run.folder / "checkpoint", force=True)
    for size in doll.sizes:
        mk.save(mk.slice(doll, size), run.folder / "slices" / str(size), force=True)
    return material


def new_doll(run: Run, material: Material) -> mk.Doll:
    """The untrained nested model of a run."""
    width = sizes_of(run.config)[-1]
    model = nesting.build(run.config, material.data.item_count, material.features, width)
    return nesting.nest(model, run.config)


def trained_doll(run: Run, material: Material) -> mk.Doll:
    """The nested model with its best weights; raises `RunError` before `train`."""
    doll = new_doll(run, material)
    load_weights(doll, run.folder / NESTED / BEST)
    return doll.eval()


# Evaluation.


def test(run: Run, material: Material, scorer: Scorer) -> dict[str, Table]:
    """Metrics of the sizes that a scorer knows, on the test set."""
    with torch.inference_mode():
        return evaluate(scorer, material.data, "test", run.config, device=device())


def evaluate_doll(run: Run, material: Material, doll: mk.Doll) -> dict[str, Table]:
    """Test metrics of every size, in one pass."""
    return test(run, material, nested_scorer(doll.to(device()).eval()))


def evaluate_slices(run: Run, material: Material) -> dict[str, Table]:
    """Test metrics of each sub-model, loaded from its own file: these are what ships."""
    found: dict[str, Table] = {}
    for size in sizes_of(run.config):
        model = mk.load(run.folder / "slices" / str(size)).to(device()).eval()
        found |= test(run, material, module_scorer(model, str(size)))
    return found


def evaluate_all(run: Run, material: Material) -> dict[str, Table]:
    """Evaluates doll and slices, writes both tables, tells how far they differ.

    Returns the doll's metrics, and those of popularity, which is the floor.
    """
    found = test(run, material, popularity_scorer(data.popularity(material.data)))
    found |= evaluate_doll(run, material, trained_doll(run, material))
    write_table(metric_table(found), "Test, every size", run.folder / "tables/nested")
    sliced = evaluate_slices(run, material)
    write_table(metric_table(sliced), "Test, sliced files", run.folder / "tables/slices")
    gap = max(
        abs(found[size][protocol][metric] - value)
        for size, table in sliced.items()
        for protocol, metrics in table.items()
        for metric, value in metrics.items()
    )
    print(f"largest difference between the doll and its sliced files: {gap:.2e}")
    return found
