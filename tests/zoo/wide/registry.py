"""The table of the wide zoo: models of libraries that the project does not depend on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from tests.zoo.registry import Entry, Maker, entry

WIDE: dict[str, Entry] = {}
MODULES = ("sequences", "pictures", "sounds", "tables", "series", "graphs", "recommenders")


def wide(library: str, *tags: str, rebuilds: bool = False) -> Callable[[Maker], Maker]:
    """Register the decorated maker as "library/name"; `rebuilds` where its widths are scaled."""

    def register(make: Maker) -> Maker:
        name = f"{library}/{make.__name__.rstrip('_')}"
        return entry(name, library, rebuilds=rebuilds, tags=tags, table=WIDE)(make)

    return register


def wide_entries(names: Iterable[str] = ()) -> list[Entry]:
    """List the entries whose name or library is named, or all of them."""
    for module in MODULES:
        importlib.import_module(f"tests.zoo.wide.{module}")
    wanted = set(names)
    found = [e for e in WIDE.values() if not wanted or {e.name, e.family} & wanted]
    if wanted and not found:
        raise KeyError(f"not in the wide zoo: {sorted(wanted)}; it holds {', '.join(WIDE)}")
    return found
