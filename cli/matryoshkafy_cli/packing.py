"""matryoshkafy pack: a checkpoint as one file per level, or a stock folder of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Folder, Force, Imports, Json, Quiet
from matryoshkafy_cli.screen import Screen, heed, import_all, stored, table

COLUMNS = ("size", "file", "bytes", "with those before")


def pack(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: CHECKPOINT-levels.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Also a stock folder of every size: hf, or st (sentence-transformers), for "
            "from_pretrained(..., quantization_config=MatryoshkaConfig(size=...)).",
        ),
    ] = None,
    imports: Imports = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a CHECKPOINT as one file per level, each with only what that level adds.

    A device with the first files has the small sizes, and fetches one more file for the next.
    Structural zeros of masked nesting are not stored.
    """
    screen = Screen(quiet, json)
    import_all(imports)
    target = output or checkpoint.parent / f"{checkpoint.name}-levels"
    with screen.step(f"packing {checkpoint}"):
        from matryoshkafy.files.checkpoint import CheckpointWarning, open_checkpoint
        from matryoshkafy.files.levels import level_file

        heed(CheckpointWarning)
        place = _packed(checkpoint, target, to, force)
        with open_checkpoint(place, digests=False) as found:
            files = [(size, level_file(i)) for i, size in enumerate(found.sizes)]
    held = [(place / name).stat().st_size for _, name in files]
    rows = [
        {"size": size, "file": name, "bytes": own, "total": sum(held[: i + 1])}
        for i, ((size, name), own) in enumerate(zip(files, held, strict=True))
    ]
    summary: dict[str, Any] = {"checkpoint": str(place), "levels": rows}
    screen.result(summary, lambda: table(str(place), COLUMNS, list(map(_row, rows))))


def _packed(checkpoint: Path, target: Path, to: str | None, force: bool) -> Path:
    if to is None:
        from matryoshkafy.files.folders import check_target
        from matryoshkafy.files.packing import pack as packed

        check_target(target, force=force)
        return packed(checkpoint, target, force=force)
    from matryoshkafy.files.checkpoint import load
    from matryoshkafy.natives.saving import save_native

    return save_native(load(checkpoint), target, to=to, like=checkpoint, force=force)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return str(row["size"]), row["file"], stored(row["bytes"]), stored(row["total"])
