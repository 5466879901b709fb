"""`run`: every stage in order, ending in the table, the plot and the sliced files."""

from __future__ import annotations

from pathlib import Path

from examples.fmrlrec import pipeline
from examples.fmrlrec.ablation import ablate
from examples.fmrlrec.building import sizes_of
from examples.fmrlrec.comparison import METRIC, compare, metric_line
from examples.fmrlrec.evaluation import Table
from examples.fmrlrec.pipeline import Run
from examples.fmrlrec.reporting import Curves, plot


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
    _list_files(run.folder)
    return found


def size_curves(found: dict[str, Table], modalities: dict[str, dict[str, Table]]) -> Curves:
    """NDCG@10 over sizes for each modality, and popularity as a level."""
    lines = {name: metric_line(tables) for name, tables in modalities.items()}
    smallest = min(next(iter(lines.values())))
    lines["popularity"] = {smallest: found["popularity"]["all"][METRIC]}
    return Curves("Test, ranking all items", METRIC, lines)


def _list_files(folder: Path) -> None:
    for kind in ("tables", "plots", "slices"):
        for path in sorted((folder / kind).rglob("*")):
            if path.is_file():
                print(f"{path}  {path.stat().st_size:,} bytes")
