"""The stages of a run, each a function of the run folder; what is there already is not redone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

import matryoshkafy as mk
from examples.fmrlrec import data, encoders, formats, nesting, reporting, synthetic
from examples.fmrlrec.config import MODALITIES, Config, DataError, RunError, replace, write_text
from examples.fmrlrec.evaluation import Scorer, Table, evaluate, module_scorer, popularity_scorer
from examples.fmrlrec.training import BEST, load_weights, train
from examples.fmrlrec.workers import device, each_on, first_process_first

INPUTS, NESTED = "inputs.json", "nested"
LEARNT = ("nested", "alone", "ablation", "slices", "checkpoint", "serving", "tables", "plots")
METRIC, TITLE = "NDCG@10", "Test, ranking all items"
METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")
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

    What can be told of a wrong setting is told here, before any data are read.
    """
    stored = folder / "config.json"
    there = Config.from_json(stored.read_text(encoding="utf-8")) if stored.exists() else config
    changed = ", ".join(
        f"{name}={value!r} (there: {before!r})"
        for (name, value), (_, before) in zip(config, there, strict=True)
        if value != before and name not in ADJUSTABLE
    )
    if changed:
        raise RunError(f"{folder} holds a run with other settings: {changed}; use another --run")
    nesting.per_size(config, "weights", nesting.sizes_of(config))
    nesting.intervals(config, nesting.sizes_of(config))
    encoders.check(config)
    if config.data != "synthetic" and not Path(config.data).exists():
        raise DataError(f"no data at {config.data}; give a folder or a file, or --data synthetic")
    reporting.write_environment(config, folder)
    return Run(folder, config)


def reopen(folder: Path) -> tuple[Run, Material]:
    """A run that exists, its settings its own, and what its models were trained on."""
    stored = folder / "config.json"
    if not stored.exists():
        raise RunError(f"no run in {folder}; make one with `run`, or name another with --run")
    opened = open_run(folder, Config.from_json(stored.read_text(encoding="utf-8")))
    return opened, prepared(opened)


# Data and features.


def prepare(run: Run) -> data.Dataset:
    """Reads, filters and orders the interactions, and tells the counts and what was wrong.

    Prepared data are used again while the input files are the same; where they changed, that is
    said, they are prepared again, and what was learnt from the old ones is put aside.
    """
    folder = run.folder / "data"
    changed, digests = _changed(run)
    if data.is_prepared(folder) and changed:
        print(f"note: {changed} changed since it was prepared; prepared again")
        _put_aside(run)
        (folder / data.REPORT).unlink()
    if not data.is_prepared(folder):
        source = formats.read(data_path(run), folder / "lines")
        data.prepare(source, folder, run.config, each_on(run.config.workers))
    write_text(folder / INPUTS, json.dumps(digests, indent=0))
    found = data.load(folder)
    counts = data.statistics(found)
    table = pl.DataFrame({"what": [*counts], "count": [*map(str, counts.values())]})
    reporting.write_table(table, "Data", run.folder / "tables/data")
    _tell_problems(found.problems)
    return found


def materials(run: Run) -> Material:
    """Prepared data, and texts and pictures encoded or found in the cache."""
    with first_process_first():
        found, each = prepare(run), each_on(run.config.workers)
        features = encoders.encode(found.catalogue, run.config, run.folder / "cache", each)
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
    learning = nesting.objective(new_doll(run, material), run.config)
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
    width = nesting.sizes_of(run.config)[-1]
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
    return test(run, material, nesting.nested_scorer(doll.to(device()).eval()))


def evaluate_all(run: Run, material: Material) -> dict[str, Table]:
    """Evaluates the doll and the sliced files, which are what ships; tells how far they differ.

    Returns the doll's metrics, and those of popularity, which is the floor.
    """
    tables = run.folder / "tables"
    found = test(run, material, popularity_scorer(data.popularity(material.data)))
    found |= evaluate_doll(run, material, trained_doll(run, material))
    reporting.write_table(reporting.metric_table(found), "Test, every size", tables / "nested")
    sliced: dict[str, Table] = {}
    for size in nesting.sizes_of(run.config):
        model = mk.load(run.folder / "slices" / str(size)).to(device()).eval()
        sliced |= test(run, material, module_scorer(model, str(size)))
    reporting.write_table(reporting.metric_table(sliced), "Test, sliced files", tables / "slices")
    gap = max(
        abs(found[size][protocol][metric] - value)
        for size, table in sliced.items()
        for protocol, metrics in table.items()
        for metric, value in metrics.items()
    )
    print(f"largest difference between the doll and its sliced files: {gap:.2e}")
    return found


# All of it, and the comparisons of the paper: modalities, and every size trained alone.


def run_everything(run: Run) -> None:
    """Prepares, encodes, trains, slices, evaluates, ablates and, if `alone` is set, compares."""
    material = train_nested(run)
    found = evaluate_all(run, material)
    modalities = {run.config.modality: found}
    if run.config.modality == "both":
        modalities = ablate(run, ("both", "text", "image"))
    lines = {name: metric_line(tables) for name, tables in modalities.items()}
    lines["popularity"] = dict.fromkeys(metric_line(found), found["popularity"]["all"][METRIC])
    reporting.plot(TITLE, lines, run.folder / "plots/sizes")
    if run.config.alone:
        compare(run, material)
    folders = [run.folder / kind for kind in ("tables", "plots", "slices")]
    reporting.print_files(path for folder in folders for path in sorted(folder.rglob("*")))


def ablate(run: Run, modalities: Iterable[str] = ()) -> dict[str, dict[str, Table]]:
    """Table 3 of the paper: the same recipe on each modality, or on all; {modality: tables}."""
    found, material = {}, prepared(run.variant(".", modality="both"))
    for modality in modalities or MODALITIES:
        print(f"modality: {modality}")
        own = modality == run.config.modality
        variant = run if own else run.variant(f"ablation/{modality}", modality=modality)
        doll = learn(variant, material)
        found[modality] = evaluate_doll(variant, material, doll)
    table = pl.DataFrame(
        {"modality": modality, "size": size, **{m: tables[size]["all"][m] for m in METRICS}}
        for modality, tables in found.items()
        for size in [*tables][-1:]
    )
    reporting.write_table(table, f"Ablation, {TITLE.lower()}", run.folder / "tables/ablation")
    return found


def compare(run: Run, material: Material, sizes: Iterable[int] = ()) -> None:
    """Trains each of `sizes` alone, or all; writes the table and plot of nested against alone.

    A model alone is one whose ladder has one rung.
    """
    if unknown := sorted({*sizes} - {*nesting.sizes_of(run.config)}):
        raise RunError(f"sizes {unknown} are not those of the run: {nesting.sizes_of(run.config)}")
    nested = evaluate_doll(run, material, trained_doll(run, material))
    before = {int(folder.name) for folder in (run.folder / "alone").glob("[0-9]*")}
    alone: dict[str, Table] = {}
    for size in sorted({*sizes, *before} if sizes else nesting.sizes_of(run.config)):
        print(f"size {size} alone")
        variant = run.variant(f"alone/{size}", sizes=str(size), weights="", every="")
        alone |= evaluate_doll(variant, material, learn(variant, material))
    file = run.folder / "tables/comparison"
    reporting.write_table(comparison(nested, alone), f"Nested against alone, {TITLE.lower()}", file)
    lines = {"nested, trained once": metric_line(nested), "each size alone": metric_line(alone)}
    reporting.plot(TITLE, lines, run.folder / "plots/comparison")


def comparison(nested: dict[str, Table], alone: dict[str, Table]) -> pl.DataFrame:
    """A row a size: NDCG@10 and Recall@10 ranking all items, and nested in percent of alone."""
    rows = [(size, nested[size]["all"], table["all"]) for size, table in alone.items()]
    return pl.DataFrame(
        {
            "size": int(size),
            f"{METRIC} nested": mine[METRIC],
            f"{METRIC} alone": theirs[METRIC],
            "nested in % of alone": round(100 * mine[METRIC] / max(theirs[METRIC], 1e-12), 1),
            "Recall@10 nested": mine["Recall@10"],
            "Recall@10 alone": theirs["Recall@10"],
        }
        for size, mine, theirs in rows
    )


def metric_line(found: dict[str, Table]) -> dict[int, float]:
    """NDCG@10 by size, ranking all items; what is no size (popularity) is left out."""
    return {int(size): t["all"][METRIC] for size, t in found.items() if size.isdigit()}
