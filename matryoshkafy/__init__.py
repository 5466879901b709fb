"""matryoshkafy makes any PyTorch model a matryoshka doll: train once, deploy any size."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from matryoshkafy.old_names import watch_imports as _watch_imports

if TYPE_CHECKING:
    from matryoshkafy.deploy.export import export as export
    from matryoshkafy.dolls.convert import convert as convert
    from matryoshkafy.dolls.convert import inspect as inspect
    from matryoshkafy.dolls.doll import Doll as Doll
    from matryoshkafy.dolls.example_inputs import example_inputs as example_inputs
    from matryoshkafy.dolls.shared import slices as slices
    from matryoshkafy.dolls.slice import slice as slice
    from matryoshkafy.dolls.verify import verify as verify
    from matryoshkafy.errors import MatryoshkafyError as MatryoshkafyError
    from matryoshkafy.files.checkpoint import load as load
    from matryoshkafy.files.packing import pack as pack
    from matryoshkafy.files.packing import upgrade as upgrade
    from matryoshkafy.losses.matryoshka import MatryoshkaLoss as MatryoshkaLoss
    from matryoshkafy.natives.native import native as native
    from matryoshkafy.natives.quantizer import MatryoshkaConfig as MatryoshkaConfig
    from matryoshkafy.natives.saving import save as save
    from matryoshkafy.plan.plan import Plan as Plan
    from matryoshkafy.rules import Weight as Weight
    from matryoshkafy.rules import rule as rule
    from matryoshkafy.units.add_dense import add_dense as add_dense
    from matryoshkafy.units.order import order as order
    from matryoshkafy.units.refit import refit as refit
    from matryoshkafy.units.rotate import rotate as rotate
    from matryoshkafy.units.untie import untie as untie

    __version__: str

_watch_imports()

# Imported at first use (PEP 562): `python -m matryoshkafy --help` must not wait for torch.
_HOMES = {
    "add_dense": "units.add_dense",
    "load": "files.checkpoint",
    "save": "natives.saving",
    "pack": "files.packing",
    "upgrade": "files.packing",
    "slices": "dolls.shared",
    "verify": "dolls.verify",
    "convert": "dolls.convert",
    "inspect": "dolls.convert",
    "native": "natives.native",
    "example_inputs": "dolls.example_inputs",
    "export": "deploy.export",
    "Doll": "dolls.doll",
    "MatryoshkafyError": "errors",
    "MatryoshkaLoss": "losses.matryoshka",
    "order": "units.order",
    "Plan": "plan.plan",
    "Weight": "rules",
    "refit": "units.refit",
    "rotate": "units.rotate",
    "rule": "rules",
    "slice": "dolls.slice",
    "untie": "units.untie",
}
# Needs transformers: `from matryoshkafy import *` must work without it.
_OPTIONAL = {"MatryoshkaConfig": "natives.quantizer"}
_PACKAGES = ("errors", "losses", "serving", "training")
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or _OPTIONAL.get(name)
    if home is not None:
        value = getattr(import_module(f"matryoshkafy.{home}"), name)
    elif name == "__version__":
        value = _version()
    elif name in _PACKAGES:
        value = import_module(f"matryoshkafy.{name}")
    else:
        raise AttributeError(f"module 'matryoshkafy' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("matryoshkafy")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_OPTIONAL, *_PACKAGES})
