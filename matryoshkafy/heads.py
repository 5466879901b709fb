"""Where `matryoshkafy.losses.heads` was in version 0.1; gone in the next version."""

import warnings
from importlib import import_module
from typing import Any

NEW = "matryoshkafy.losses.heads"


def __getattr__(name: str) -> Any:
    found = getattr(import_module(NEW), name)
    warnings.warn(
        f"matryoshkafy.heads.{name} is {NEW}.{name} now; the old name will be gone in the next "
        "version",
        DeprecationWarning,
        stacklevel=2,
    )
    return found
