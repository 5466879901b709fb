"""Table 3 of the paper: text and pictures, text only, pictures only, neither."""

from __future__ import annotations

from collections.abc import Iterable

from examples.fmrlrec.config import MODALITIES
from examples.fmrlrec.evaluation import Table
from examples.fmrlrec.objectives import NestedObjective
from examples.fmrlrec.pipeline import Material, Run, evaluate_nested, new_doll, with_all_features
from examples.fmrlrec.reporting import Sheet, write_sheet
from examples.fmrlrec.training import train

METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")


def ablate(
    run: Run, material: Material, modalities: Iterable[str] = MODALITIES
) -> dict[str, dict[str, Table]]:
    """Trains the nested model on each modality with the same recipe; returns {modality: tables}."""
    found, material = {}, with_all_features(run, material)
    for modality in modalities:
        variant = run.variant(f"ablation/{modality}", modality=modality)
        if modality == run.config.modality:
            variant = run
        doll = new_doll(variant, material)
        objective = NestedObjective(doll, variant.config)
        train(objective, material.data, variant.config, variant.folder / "nested")
        found[modality] = evaluate_nested(variant, material, doll)
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
