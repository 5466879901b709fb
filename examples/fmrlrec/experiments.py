"""`run`, and the two comparisons of the paper: modalities, and every size trained alone."""

from __future__ import annotations

from collections.abc import Iterable

from examples.fmrlrec import pipeline
from examples.fmrlrec.config import MODALITIES
from examples.fmrlrec.evaluation import Table
from examples.fmrlrec.nesting import NestedObjective, sizes_of
from examples.fmrlrec.pipeline import Material, Run
from examples.fmrlrec.reporting import Curves, Sheet, plot, print_files, write_sheet
from examples.fmrlrec.training import train

METRIC = "NDCG@10"
METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")


def run_everything(run: Run) -> dict[str, Table]:
    """Prepares, encodes, trains, slices, evaluates, ablates and, if `alone` is set, compares."""
    material = pipeline.materials(run)
    pipeline.train_nested(run, material)
    found = pipeline.evaluate_all(run, material)
    modalities = {"both": found}
    if run.config.modality == "both":
        modalities = ablate(run, material, ("both", "text", "image"))
    plot(size_curves(found, modalities), run.folder / "plots", "sizes")
    if run.config.alone:
        compare(run, material, found, list(sizes_of(run.config)))
    folders = [run.folder / kind for kind in ("tables", "plots", "slices")]
    print_files(path for folder in folders for path in sorted(folder.rglob("*")))
    return found


def size_curves(found: dict[str, Table], modalities: dict[str, dict[str, Table]]) -> Curves:
    """NDCG@10 over sizes for each modality, and popularity as a level."""
    lines = {name: metric_line(tables) for name, tables in modalities.items()}
    smallest = min(next(iter(lines.values())))
    lines["popularity"] = {smallest: found["popularity"]["all"][METRIC]}
    return Curves("Test, ranking all items", METRIC, lines)


def ablate(
    run: Run, material: Material, modalities: Iterable[str] = MODALITIES
) -> dict[str, dict[str, Table]]:
    """Table 3 of the paper: trains on each modality with the same recipe; {modality: tables}."""
    found, material = {}, pipeline.with_all_features(run, material)
    for modality in modalities:
        variant = run.variant(f"ablation/{modality}", modality=modality)
        if modality == run.config.modality:
            variant = run
        doll = pipeline.new_doll(variant, material)
        objective = NestedObjective(doll, variant.config)
        train(objective, material.data, variant.config, variant.folder / "nested")
        found[modality] = pipeline.evaluate_nested(variant, material, doll)
    write_sheet(ablation_sheet(found), run.folder / "tables", "ablation")
    return found


def ablation_sheet(found: dict[str, dict[str, Table]]) -> Sheet:
    """A row a modality: the largest size, ranking all items."""
    rows = tuple(
        (modality, size, *(tables[size]["all"][metric] for metric in METRICS))
        for modality, tables in found.items()
        for size in [list(tables)[-1]]
    )
    return Sheet("Ablation, test, ranking all items", ("modality", "size", *METRICS), rows)


def compare(run: Run, material: Material, nested: dict[str, Table], sizes: list[int]) -> Sheet:
    """Trains each size alone, and writes the table and the plot of nested against alone."""
    for size in sizes:
        pipeline.train_alone(run, material, size)
    alone = pipeline.evaluate_alone(run, material)
    sheet = comparison_sheet(nested, alone)
    write_sheet(sheet, run.folder / "tables", "comparison")
    plot(comparison_curves(nested, alone), run.folder / "plots", "comparison")
    return sheet


def comparison_sheet(nested: dict[str, Table], alone: dict[str, Table]) -> Sheet:
    """A row a size: NDCG@10 and Recall@10 ranking all items, and nested in percent of alone."""
    rows = []
    for size in (name for name in alone if name in nested):
        mine, theirs = nested[size]["all"], alone[size]["all"]
        share = 100 * mine[METRIC] / max(theirs[METRIC], 1e-12)
        rows.append((int(size), mine[METRIC], theirs[METRIC], round(share, 1),
                     mine["Recall@10"], theirs["Recall@10"]))  # fmt: skip
    columns = ("size", f"{METRIC} nested", f"{METRIC} alone", "nested in % of alone",
               "Recall@10 nested", "Recall@10 alone")  # fmt: skip
    return Sheet("Nested against alone, test, ranking all items", columns, tuple(rows))


def comparison_curves(nested: dict[str, Table], alone: dict[str, Table]) -> Curves:
    """NDCG@10 over sizes for both."""
    lines = {"nested, trained once": metric_line(nested), "each size alone": metric_line(alone)}
    return Curves("Test, ranking all items", METRIC, lines)


def metric_line(found: dict[str, Table]) -> dict[float, float]:
    """NDCG@10 by size, ranking all items; what is no size (popularity) is left out."""
    return {float(size): t["all"][METRIC] for size, t in found.items() if size.isdigit()}
