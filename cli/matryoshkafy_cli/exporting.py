"""matryoshkafy export: a sub-model as a file of ONNX Runtime or torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matryoshkafy_cli.options import Batch, Debug, Folder, Force, Imports, Json, Length, Quiet
from matryoshkafy_cli.screen import Screen, import_all, stored


def export(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    to: Annotated[
        str, typer.Option("--to", help="onnx, onnx-fp16, onnx-int8 or pt2.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Default: CHECKPOINT.onnx, .fp16.onnx, .int8.onnx, .pt2."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="One of the sizes. Default: the largest.")
    ] = None,
    batch: Batch = None,
    length: Length = None,
    imports: Imports = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export a size of a CHECKPOINT as a file that runs without matryoshkafy.

    The file is run and compared with the sub-model before it is put in place, on random inputs of
    the shapes that the model was traced with unless --batch and --length say otherwise; onnx keeps
    free what the trace left free. Computes with the graph of the checkpoint.
    """
    screen = Screen(quiet, json)
    import_all(imports)
    ending = ".".join(reversed(to.split("-")))  # onnx-int8: NAME.int8.onnx
    target = output or checkpoint.parent / f"{checkpoint.name}.{ending}"
    with screen.step(f"loading {checkpoint}"):
        from matryoshkafy.deploy import export as exporting
        from matryoshkafy.dolls.example_inputs import example_inputs
        from matryoshkafy.files.checkpoint import open_checkpoint

        exporting.check_file(target, to, force=force)
        found = open_checkpoint(checkpoint)
        small = found.sub_model(found.sizes[-1] if size is None else size)
    with screen.step(f"exporting to {to} and checking"):
        args, kwargs = example_inputs(small, batch=batch, length=length)
        done = exporting.export(small, target, to=to, args=args, kwargs=kwargs, force=force)
    held = done.path.stat().st_size
    summary = {"file": str(done.path), "to": to, "bytes": held, "relative_error": done.error}
    screen.result(
        summary,
        lambda: f"{done.path}: {stored(held)}, largest relative difference {done.error:.2g}",
    )
