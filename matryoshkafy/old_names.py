"""Modules of version 0.1 under the names that they had; gone in the next version."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType

# Old name: new name, both inside the package. What the reference of version 0.1 showed.
MODULES: Mapping[str, str] = MappingProxyType(
    {
        "checkpoint": "files.checkpoint",
        "checks": "dolls.verify",
        "converting": "dolls.convert",
        "dims": "axes.dims",
        "doll": "dolls.doll",
        "exporting": "deploy.export",
        "heads": "losses.heads",
        "profiling": "deploy.profile",
        "report_page.metrics": "report.page.metrics",
        "reporting": "report.report",
        "slicing": "dolls.slice",
    }
)
# Names that have changed, too: {old module: {old name: new name}}.
RENAMED: Mapping[str, Mapping[str, str]] = MappingProxyType({"dims": {"Cat": "Sum"}})
# Parents of the above that hold nothing themselves.
PARENTS = frozenset({"report_page"})


def forwarder(
    old: str,
    new: str,
    only: Collection[str] | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[str], object]:
    """Return a module's `__getattr__`, which warns and takes each name from where it is now.

    Args:
        old: the module that has it.
        new: the module that holds what it hands out.
        only: the names that it hands out; all by default.
        renamed: {old name: new name}, where it has changed as well.
    """

    def taken(name: str) -> object:
        if name.startswith("__") or (only is not None and name not in only):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        now = renamed.get(name, name)
        found = getattr(import_module(new), now)
        warnings.warn(
            f"{old}.{name} is {new}.{now} now; the old name will be gone in the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return taken


class _Old(MetaPathFinder, Loader):
    """Finds the old names, after everything that is really there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "matryoshkafy" or name not in {*MODULES, *PARENTS}:
            return None
        return ModuleSpec(fullname, self, is_package=name in PARENTS)

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        if name in MODULES:
            new, renamed = f"{package}.{MODULES[name]}", RENAMED.get(name, {})
            forward = forwarder(module.__name__, new, renamed=renamed)
            module.__getattr__ = forward  # type: ignore[method-assign]


def watch_imports() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Old) for finder in sys.meta_path):
        sys.meta_path.append(_Old())
