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

METRIC, TITLE = "NDCG@10", "Test, ranking all items"
METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")


def run_everything(run: Run) -> dict[str, Table]:
    """Prepares, encodes, trains, slices, evaluates, ablates and, if `alone` is set, compares."""
    material = pipeline.materials(run)
    pipeline.train_nested(run, material)
    found = pipeline.evaluate_all(run, material)
    modalities = {"both": found}
    if run.config.modality == "both":
        modalities = ablate(run, material, ("both", "text", "image"))
    lines = {name: metric_line(tables) for name, tables in modalities.items()}
    lines["popularity"] = {min(lines["both"]): found["popularity"]["all"][METRIC]}
    plot(Curves(TITLE, METRIC, lines), run.folder / "plots", "sizes")
    if run.config.alone:
        compare(run, material, found)
    folders = [run.folder / kind for kind in ("tables", "plots", "slices")]
    print_files(path for folder in folders for path in sorted(folder.rglob("*")))
    return found


def ablate(
    run: Run, material: Material, modalities: Iterable[str] = ()
) -> dict[str, dict[str, Table]]:
    """Table 3 of the paper: the same recipe on each modality, or on all; {modality: tables}.

    Its sheet has a row a modality: the largest size, ranking all items.
    """
    every = pipeline.encode(run.variant(".", modality="both"), material.data)
    found, material = {}, Material(material.data, every)
    for modality in modalities or MODALITIES:
        variant = run.variant(f"ablation/{modality}", modality=modality)
        if modality == run.config.modality:
            variant = run
        doll = pipeline.new_doll(variant, material)
        objective = NestedObjective(doll, variant.config)
        train(objective, material.data, variant.config, variant.folder / "nested")
        found[modality] = pipeline.evaluate_nested(variant, material, doll)
    rows = tuple(
        (modality, size, *(tables[size]["all"][metric] for metric in METRICS))
        for modality, tables in found.items()
        for size in [list(tables)[-1]]
    )
    sheet = Sheet("Ablation, test, ranking all items", ("modality", "size", *METRICS), rows)
    write_sheet(sheet, run.folder / "tables", "ablation")
    return found


def compare(
    run: Run, material: Material, nested: dict[str, Table], sizes: Iterable[int] = ()
) -> Sheet:
    """Trains each of `sizes` alone, or all; writes the table and plot of nested against alone."""
    for size in sizes or sizes_of(run.config):
        pipeline.train_alone(run, material, size)
    alone = pipeline.evaluate_alone(run, material)
    sheet = comparison_sheet(nested, alone)
    write_sheet(sheet, run.folder / "tables", "comparison")
    lines = {"nested, trained once": metric_line(nested), "each size alone": metric_line(alone)}
    plot(Curves(TITLE, METRIC, lines), run.folder / "plots", "comparison")
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


def metric_line(found: dict[str, Table]) -> dict[float, float]:
    """NDCG@10 by size, ranking all items; what is no size (popularity) is left out."""
    return {float(size): t["all"][METRIC] for size, t in found.items() if size.isdigit()}
