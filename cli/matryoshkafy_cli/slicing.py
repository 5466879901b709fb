"""matryoshkafy slice: standalone checkpoints of smaller sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Folder, Force, Imports, Json, Output, Quiet
from matryoshkafy_cli.screen import (
    CommandError,
    Screen,
    heed,
    human_bytes,
    human_count,
    import_all,
)


def slice_(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    output: Output,
    size: Annotated[
        list[int] | None, typer.Option("--size", help="A size of the checkpoint. May repeat.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every size.")] = False,
    imports: Imports = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Cut standalone sub-models out of a CHECKPOINT, each a checkpoint of its own.

    Reads and cuts the weights; the graph is not run, except what it makes of weights alone.
    One --size goes to OUTPUT itself; several, or --all, to OUTPUT/SIZE.
    """
    if every == bool(size):
        raise CommandError(
            f"--size {size} and --all were given; expected one of them. Name the sizes, or take "
            "--all."
            if every
            else "neither --size nor --all was given; expected one of them. "
            "Name the sizes, or take --all."
        )
    screen = Screen(quiet, json)
    import_all(imports)
    with screen.step(f"checking {checkpoint}"):
        from matryoshkafy.files.checkpoint import CheckpointWarning, open_checkpoint
        from matryoshkafy.files.folders import check_target

        found = open_checkpoint(checkpoint)
        targets = _targets(found, size, output)
        for target in targets.values():
            _check_apart(target, found.folder)
            check_target(target, force=force)
    heed(CheckpointWarning)
    rows = []
    for each, target in targets.items():
        with screen.step(f"slicing {each}"):
            rows.append(_cut(found, each, target, force))
    screen.result(rows, lambda: "\n".join(map(_line, rows)))


def _targets(found: Any, sizes: list[int] | None, output: Path) -> dict[int, Path]:
    wanted = list(dict.fromkeys(sizes or found.sizes))
    for size in wanted:
        found.plan.level(size)
    if sizes is not None and len(wanted) == 1:
        return {wanted[0]: output}
    return {size: output / str(size) for size in wanted}


def _check_apart(target: Path, source: Path) -> None:
    """A slice over, in or around its own source would cost the larger sizes."""
    place = target.resolve()
    if source == place or source in place.parents or place in source.parents:
        raise CommandError(
            f"-o {target} was given, which is the checkpoint itself, or lies in or around it; "
            "expected another place, because the larger sizes are needed. Choose another folder."
        )


def _cut(found: Any, size: int, target: Path, force: bool) -> dict[str, Any]:
    from matryoshkafy.deploy.profile import size_of
    from matryoshkafy.files.checkpoint import save

    small = found.sub_model(size)
    save(small, target, force=force)
    parameters, held = size_of(small)
    return {"checkpoint": str(target), "size": size, "parameters": parameters, "bytes": held}


def _line(row: dict[str, Any]) -> str:
    counts = f"{human_count(row['parameters'])} parameters, {human_bytes(row['bytes'])}"
    return f"{row['checkpoint']}: size {row['size']}, {counts}"
