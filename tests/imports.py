"""Who imports whom in the library: modules, rooms (a folder, or a file beside the folders), floors.

`python -m tests.imports` prints the rooms from the ground up, and what the house page states.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "matryoshkafy"
NAME = PACKAGE.name
# The flow, from the ground up: a room imports only from rooms that stand before it.
ROOMS = (
    *("old_names", "errors", "sizes", "outputs"),
    *("axes", "graph", "rules", "plan", "kernels", "rewrite", "dolls", "files"),
    *("deploy", "units", "natives", "serving", "losses", "training", "report"),
    *("__init__", "__main__"),
)


def module_of(path: Path) -> str:
    """Return a file's dotted name: matryoshkafy/plan/walk.py -> plan.walk."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    """Return the room of a module: plan.walk -> plan."""
    return module.partition(".")[0]


@cache
def modules() -> Mapping[str, Path]:
    """Return every module of the library by its dotted name."""
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    """Return the library's modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in _named(node):
            own = name.removeprefix(f"{NAME}.")
            candidates = (own, own.rpartition(".")[0])
            if name.startswith(f"{NAME}."):
                found.update([c for c in candidates if c in modules()][:1])
    return found - {module_of(path)}


@cache
def module_imports() -> Mapping[str, frozenset[str]]:
    """Return {module: modules that it imports}; a package's own re-exports do not count."""
    return {
        name: frozenset(imports_of(path))
        for name, path in modules().items()
        if path.name != "__init__.py"
    }


def dynamic_imports() -> dict[str, str]:
    """Return {module: what it imports by name}: import_module of one of the library's own."""
    found: dict[str, str] = {}
    for module, path in modules().items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        looks_up = any(_name_of(n) == "import_module" for n in nodes)
        texts = [str(n.value) for n in nodes if isinstance(n, ast.Constant)]
        named = [t for t in texts if t.startswith(f"{NAME}.") and t.split(".", 1)[1] in modules()]
        if looks_up and named:
            found[module] = named[0].split(".", 1)[1]
    return found


def _name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def room_imports() -> dict[str, set[str]]:
    """Return {room: rooms that it imports from}."""
    out: dict[str, set[str]] = {}
    for module, others in module_imports().items():
        room = room_of(module)
        out.setdefault(room, set()).update({room_of(o) for o in others} - {room})
    return out


def circle(graph: Mapping[str, set[str] | frozenset[str]]) -> list[str]:
    """Return one circle of imports, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room: one above the highest that it imports from."""
    out: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        out[room] = 1 + max((out[other] for other in graph.get(room, ())), default=0)
    return out


def main() -> None:
    """Print the rooms by floor, and the counts."""
    graph = room_imports()
    found = circle(graph)
    if found:
        print("circle:", " -> ".join(found))
        return
    by_room = floors(graph)
    for room in sorted(by_room, key=lambda r: (by_room[r], r)):
        print(f"{by_room[room]:3d}  {room:10s} <- {', '.join(sorted(graph.get(room, ())))}")
    arrows = sum(map(len, graph.values()))
    beside = [p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")]
    print(f"floors {max(by_room.values())}, arrows {arrows}, modules beside folders {len(beside)}")


if __name__ == "__main__":
    main()
