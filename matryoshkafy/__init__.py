"""matryoshkafy makes any PyTorch model a matryoshka doll: train once, deploy any size."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshkafy.checkpoint import load as load
    from matryoshkafy.checkpoint import save as save
    from matryoshkafy.checks import verify as verify
    from matryoshkafy.converting import convert as convert
    from matryoshkafy.converting import inspect as inspect
    from matryoshkafy.doll import Doll as Doll
    from matryoshkafy.errors import MatryoshkafyError as MatryoshkafyError
    from matryoshkafy.plan import Plan as Plan
    from matryoshkafy.rules import rule as rule
    from matryoshkafy.slicing import slice as slice

# Imported at first use (PEP 562): `python -m matryoshkafy --help` must not wait for torch.
_HOMES = {
    "load": "checkpoint",
    "save": "checkpoint",
    "verify": "checks",
    "convert": "converting",
    "inspect": "converting",
    "Doll": "doll",
    "MatryoshkafyError": "errors",
    "Plan": "plan",
    "rule": "rules",
    "slice": "slicing",
}
_PACKAGES = ("errors", "heads", "losses", "training")
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"matryoshkafy.{_HOMES[name]}"), name)
    elif name in _PACKAGES:
        value = import_module(f"matryoshkafy.{name}")
    else:
        raise AttributeError(f"module 'matryoshkafy' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
