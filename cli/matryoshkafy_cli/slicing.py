"""matryoshkafy slice: standalone checkpoints of smaller sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshkafy_cli.options import Debug, Folder, Force, Imports, Json, Output, Quiet
from matryoshkafy_cli.screen import CommandError, Screen, counted, heed, import_all, stored


def slice_(  # noqa: PLR0913  an option is a parameter
    checkpoint: Folder,
    output: Output,
    size: Annotated[
        list[int] | None, typer.Option("--size", help="A size of the checkpoint. May repeat.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every size.")] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="A stock model's folder instead: hf, st (sentence-transformers), timm, open_clip "
            "or class.",
        ),
    ] = None,
    builder: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="MODULE:BUILD",
            help="What builds the model, all arguments with values (runs its code).",
        ),
    ] = None,
    imports: Imports = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Cut standalone sub-models out of a CHECKPOINT, each a checkpoint of its own.

    Reads and cuts the weights; the graph is not run, except what it makes of weights alone.
    One --size goes to OUTPUT itself; several, or --all, to OUTPUT/SIZE. With --to, the folder is
    a stock model at the smaller configuration: found, compared with the slice, and written.
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

        found = open_checkpoint(checkpoint)
        targets = _targets(found, size, output)
        for target in targets.values():
            _check_apart(target, found.folder)
            _check_free(target, to, force)
        like = _like(found, to, builder)
    heed(CheckpointWarning)
    rows = []
    for each, target in targets.items():
        with screen.step(f"slicing {each}"):
            rows.append(_cut(found, (each, to, like), target, force))
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


def _check_free(target: Path, to: str | None, force: bool) -> None:
    if to is None:
        from matryoshkafy.files.folders import check_target

        check_target(target, force=force)
    else:
        from matryoshkafy.natives.places import check_free

        check_free(target, force=force)


def _like(found: Any, to: str | None, builder: str | None) -> Any:
    """What a stock model is built from: the user's own function, or what the checkpoint keeps."""
    if builder is not None:
        if to is None:
            raise CommandError(
                f"--class {builder} was given without --to; expected --to class with it, to write "
                "a model of that class. Add it."
            )
        return _imported(builder)
    if to is not None:
        from matryoshkafy.natives.saving import recipe_of_source, source_in

        recipe_of_source(source_in(found))
    return found.folder


def _imported(builder: str) -> Any:
    import pkgutil
    import sys

    sys.path.insert(0, str(Path.cwd()))
    try:
        return pkgutil.resolve_name(builder)
    except Exception as error:  # noqa: BLE001  the user's code may raise anything
        raise CommandError(
            f"--class {builder} was given, but it cannot be imported ({type(error).__name__}: "
            f"{error}); expected package.module:build. Check the name, or install it."
        ) from error


def _cut(
    found: Any, what: tuple[int, str | None, Any], target: Path, force: bool
) -> dict[str, Any]:
    from matryoshkafy.deploy.profile import size_of

    size, to, like = what
    small = found.sub_model(size)
    if to is None:
        from matryoshkafy.files.checkpoint import save

        save(small, target, force=force)
    else:
        from matryoshkafy.natives.saving import save_native

        save_native(small, target, to=to, like=like, force=force)
    parameters, held = size_of(small)
    row = {"checkpoint": str(target), "size": size, "parameters": parameters, "bytes": held}
    return row if to is None else {**row, "to": to}


def _line(row: dict[str, Any]) -> str:
    counts = f"{counted(row['parameters'])} parameters, {stored(row['bytes'])}"
    how = f" for {row['to']}" if "to" in row else ""
    return f"{row['checkpoint']}: size {row['size']}{how}, {counts}"
