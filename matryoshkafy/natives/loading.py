"""load_native(): the folder of a native size, by its own library, tables in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from matryoshkafy.natives.places import MARK
from matryoshkafy.natives.recipe import NativeError
from matryoshkafy.natives.writing import load


def load_native(folder: str | Path, *, build: Callable[..., nn.Module] | None = None) -> Any:
    """Return the model of a folder that `save(..., to=...)` wrote, in evaluation mode.

    Args:
        folder: its path.
        build: for to="class", the user's class or function; it gets its arguments by name. What
            no JSON holds it must have itself: `functools.partial(Net, act_layer=nn.GELU)`.

    Raises:
        NativeError: where the folder is no native size, or is of a class and `build` is missing.
    """
    if not (Path(folder) / MARK).is_file():
        raise NativeError(
            f"{folder} holds no {MARK}; expected a folder that matryoshkafy.save(..., to=...) "
            "wrote. Check the path."
        )
    return load(folder, build=None if build is None else lambda arguments: build(**arguments))
