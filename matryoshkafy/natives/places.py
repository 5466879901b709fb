"""What marks the folder of a native size, and where one may be written."""

from __future__ import annotations

import os
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
