"""matryoshkafy info: what each size of a checkpoint costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Batch, Debug, Device, Folder, Imports, Json, Length, Quiet
from matryoshkafy_cli.screen import Screen, counted, import_all, stored, table, timed

COLUMNS = ("size", "parameters", "bytes", "FLOPs", "latency")


def info(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    device: Device = "cpu",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed passes per size.")] = 7,
    batch: Batch = None,
    length: Length = None,
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print sizes, parameters, bytes, FLOPs and measured latency of a CHECKPOINT.

    Inputs are random, of the shapes that the model was traced with unless --batch and --length
    say otherwise; latency is the median.
    Computes with the graph of the checkpoint, once per size and run.
    """
    screen = Screen(quiet, json)
    import_all(imports)
    with screen.step(f"checking {checkpoint}"):
        from matryoshkafy.deploy.profile import device_of, profile_at
        from matryoshkafy.files.checkpoint import open_checkpoint

        place = device_of(device)
        found = open_checkpoint(checkpoint)
    rows, inputs = [], ""
    for size in found.sizes:
        with screen.step(f"measuring size {size}"):
            small = found.sub_model(size)
            cost, inputs = profile_at(small, place, batch=batch, length=length, runs=runs)
            named = {"parameters": cost.parameters, "bytes": cost.bytes, "flops": cost.flops}
            rows.append({"size": size, **named, "latency_seconds": cost.latency})
    described = _described(found, device, inputs, rows)
    screen.result(described, lambda: _text(described))


def _described(found: Any, device: str, inputs: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "checkpoint": str(found.folder),
        "kind": found.kind,
        "nesting": found.plan.options.nesting,
        "width": found.plan.width,
        "specialised": found.described.specialised,
        "notes": list(found.described.trace.notes),
        "versions": dict(found.described.versions),
        "device": device,
        "inputs": inputs,
        "sizes": rows,
    }


def _text(described: dict[str, Any]) -> str:
    made = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
    what = f"doll of width {described['width']}"
    if described["kind"] == "submodel":
        what = f"sub-model of size {described['sizes'][-1]['size']} of width {described['width']}"
    lines = [
        f"{described['checkpoint']}: {what}, {described['nesting']} nesting",
        f"saved by {made}; a call on {described['device']} takes {described['inputs']}",
    ]
    if described["specialised"]:
        lines.append("specialised: it holds the branch that the example inputs took")
    rows = [
        (
            str(row["size"]),
            counted(row["parameters"]),
            stored(row["bytes"]),
            counted(row["flops"]),
            timed(row["latency_seconds"]),
        )
        for row in described["sizes"]
    ]
    return table("\n".join([*lines, *described["notes"]]), COLUMNS, rows)
