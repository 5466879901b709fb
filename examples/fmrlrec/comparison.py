"""Nested against alone: every size trained by itself with the same recipe."""

from __future__ import annotations

from examples.fmrlrec.evaluation import Table
from examples.fmrlrec.pipeline import Material, Run, evaluate_alone, train_alone
from examples.fmrlrec.reporting import Curves, Sheet, plot, write_sheet

METRIC = "NDCG@10"


def compare(run: Run, material: Material, nested: dict[str, Table], sizes: list[int]) -> Sheet:
    """Trains each size alone, and writes the table and the plot of nested against alone."""
    for size in sizes:
        train_alone(run, material, size)
    alone = evaluate_alone(run, material)
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
