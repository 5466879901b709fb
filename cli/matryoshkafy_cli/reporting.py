"""matryoshkafy report: a checkpoint as one page that opens offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import (
    Batch,
    Debug,
    Device,
    Folder,
    Imports,
    Json,
    Length,
    Quiet,
)
from matryoshkafy_cli.screen import Screen, import_all


def report(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")] = Path(
        "report.html"
    ),
    metrics: Annotated[
        Path | None,
        typer.Option("--metrics", help="CSV: a column `size`, and one for each metric."),
    ] = None,
    searches: Annotated[
        Path | None,
        typer.Option("--retrieval", help="JSON that `retrieve --tune COLUMN --json` printed."),
    ] = None,
    cascade: Annotated[
        Path | None, typer.Option("--cascade", help="JSON that `cascade --json` printed.")
    ] = None,
    device: Device = "cpu",
    batch: Batch = None,
    length: Length = None,
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw what nests, what each size costs and achieves, as one HTML page for offline use.

    Computes with the graph of the checkpoint, once per size and run.

    Latency is measured on random inputs of the shapes that the model was traced with, unless
    --batch and --length say otherwise.
    """
    screen = Screen(quiet, json)
    import_all(imports)
    given = _tables(searches, cascade)
    with screen.step(f"measuring every size of {checkpoint}"):
        from matryoshkafy.report.report import report_of, write_report

        found = report_of(checkpoint, metrics, device=device, batch=batch, length=length)
        page = write_report(replace(found, **given), output)
    screen.result({"report": str(page)}, lambda: str(page))


def _tables(searches: Path | None, cascade: Path | None) -> dict[str, Any]:
    """Read the tables of trade-offs first: what cannot be read is told before anything is timed."""
    from matryoshkafy.report.page.tables import read_cascade, read_searches

    found: dict[str, Any] = {}
    if searches is not None:
        found["searches"] = read_searches(searches)
    if cascade is not None:
        found["cascade"] = read_cascade(cascade)
    return found
