"""A folder with folders in it, written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from matryoshkafy.natives.recipe import NativeError

MARK = "native.json"


def check_free(folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return the absolute path; raises NativeError where it is taken.

    force: a native size that stands there may be replaced, nothing else.
    """
    target = Path(os.path.realpath(folder))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir():
        raise NativeError(f"{target} is a file, expected a folder. Choose another name.")
    if not force:
        raise NativeError(
            f"{target} exists and is not empty. Choose another folder, or replace it with force "
            "(--force)."
        )
    if not (target / MARK).is_file():
        raise NativeError(
            f"{target} holds no {MARK}, so it is no native size, and is not replaced. Choose "
            "another folder, or remove this one yourself."
        )
    return target


def write_tree(
    folder: str | os.PathLike[str], write: Callable[[Path], None], *, force: bool = False
) -> Path:
    """Write a folder beside its place by a function of its path, then move it there.

    What the function raises passes through; then nothing is left behind.
    """
    target = check_free(folder, force=force)
    fresh = target.parent / f".{target.name}.{secrets.token_hex(6)}.new"
    try:
        fresh.mkdir(parents=True)
        write(fresh)
        _place(fresh, target)
    except OSError as error:
        raise NativeError(
            f"cannot write {target}: {error.strerror or error}. Choose a folder that you may write "
            "to, on a disk with free space."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _place(fresh: Path, target: Path) -> None:
    old = fresh.with_suffix(".old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
