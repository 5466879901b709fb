"""`run`, and the two comparisons of the paper: modalities, and every size trained alone."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from examples.fmrlrec import pipeline
from examples.fmrlrec.config import MODALITIES, RunError
from examples.fmrlrec.evaluation import Table
from examples.fmrlrec.nesting import sizes_of
from examples.fmrlrec.pipeline import Material, Run
from examples.fmrlrec.reporting import plot, print_files, write_table

METRIC, TITLE = "NDCG@10", "Test, ranking all items"
METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")


def run_everything(run: Run) -> None:
    """Prepares, encodes, trains, slices, evaluates, ablates and, if `alone` is set, compares."""
    material = pipeline.train_nested(run)
    found = pipeline.evaluate_all(run, material)
    modalities = {run.config.modality: found}
    if run.config.modality == "both":
        modalities = ablate(run, ("both", "text", "image"))
    lines = {name: metric_line(tables) for name, tables in modalities.items()}
    lines["popularity"] = dict.fromkeys(metric_line(found), found["popularity"]["all"][METRIC])
    plot(TITLE, lines, run.folder / "plots/sizes")
    if run.config.alone:
        compare(run, material)
    folders = [run.folder / kind for kind in ("tables", "plots", "slices")]
    print_files(path for folder in folders for path in sorted(folder.rglob("*")))


def ablate(run: Run, modalities: Iterable[str] = ()) -> dict[str, dict[str, Table]]:
    """Table 3 of the paper: the same recipe on each modality, or on all; {modality: tables}."""
    found, material = {}, pipeline.prepared(run.variant(".", modality="both"))
    for modality in modalities or MODALITIES:
        print(f"modality: {modality}")
        own = modality == run.config.modality
        variant = run if own else run.variant(f"ablation/{modality}", modality=modality)
        doll = pipeline.learn(variant, material)
        found[modality] = pipeline.evaluate_doll(variant, material, doll)
    largest = {modality: [*tables.items()][-1] for modality, tables in found.items()}
    table = pl.DataFrame(
        {"modality": modality, "size": size, **{m: metrics["all"][m] for m in METRICS}}
        for modality, (size, metrics) in largest.items()
    )
    write_table(table, f"Ablation, {TITLE.lower()}", run.folder / "tables/ablation")
    return found


def compare(run: Run, material: Material, sizes: Iterable[int] = ()) -> None:
    """Trains each of `sizes` alone, or all; writes the table and plot of nested against alone.

    A model alone is one whose ladder has one rung.
    """
    if unknown := sorted({*sizes} - {*sizes_of(run.config)}):
        raise RunError(f"sizes {unknown} are not those of the run: {sizes_of(run.config)}")
    nested = pipeline.evaluate_doll(run, material, pipeline.trained_doll(run, material))
    before = {int(folder.name) for folder in (run.folder / "alone").glob("[0-9]*")}
    alone: dict[str, Table] = {}
    for size in sorted({*sizes, *before} if sizes else sizes_of(run.config)):
        print(f"size {size} alone")
        variant = run.variant(f"alone/{size}", sizes=str(size), weights="", every="")
        alone |= pipeline.evaluate_doll(variant, material, pipeline.learn(variant, material))
    file = run.folder / "tables/comparison"
    write_table(comparison(nested, alone), f"Nested against alone, {TITLE.lower()}", file)
    lines = {"nested, trained once": metric_line(nested), "each size alone": metric_line(alone)}
    plot(TITLE, lines, run.folder / "plots/comparison")


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
