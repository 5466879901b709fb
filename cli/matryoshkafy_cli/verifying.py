"""matryoshkafy verify: the laws, on a checkpoint."""

from __future__ import annotations

import typer

from matryoshkafy_cli.options import Debug, Device, Folder, Imports, Json, Quiet
from matryoshkafy_cli.screen import Screen, import_all


def verify(
    checkpoint: Folder,
    device: Device = "cpu",
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check the laws of nesting on a CHECKPOINT, on random inputs; exit code 1 when one fails."""
    screen = Screen(quiet, json)
    import_all(imports)
    raise typer.Exit(1)
