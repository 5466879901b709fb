"""Writes what the code says of itself into README.md and pages of the documentation.

    python docs/tree.py            # writes
    python docs/tree.py --check    # exits 1 where a page is behind

What stands between `<!-- tree: KIND ... -->` and `<!-- /tree -->` is generated: the folders (KIND
folders), every module (KIND modules) with the first sentence of its docstring, every error (KIND
errors), or the measures of the house (KIND measures). The pages cannot tell
what the code does not.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import imports, measures  # noqa: E402

SECTION = re.compile(r"(<!-- tree: (?P<kind>\w+).*?-->\n).*?(<!-- /tree -->)", re.DOTALL)
PAGES = ("README.md", "docs/where.md", "docs/house.md", "docs/reference/errors.md")
ERRORS = ROOT / "matryoshkafy" / "errors.py"


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0].rstrip(".")


def rooms() -> Iterator[tuple[str, list[Path]]]:
    """Yield (room, its modules) in the order of the flow; files beside the folders come first."""
    for room in imports.ROOMS:
        folder = imports.PACKAGE / room
        if folder.is_dir():
            inside = [p for p in sorted(folder.rglob("*.py")) if p.name != "__init__.py"]
            yield room, inside
        elif not room.startswith("__") and folder.with_suffix(".py").exists():
            yield room, []


def folders() -> str:
    """Return the folders as a tree of text."""
    lines = ["```text", "matryoshkafy/"]
    for room, inside in rooms():
        path = imports.PACKAGE / room
        name = f"{room}/" if inside else f"{room}.py"
        source = path / "__init__.py" if inside else path.with_suffix(".py")
        lines.append(f"  {name:12} {first_sentence(source)}")
    return "\n".join([*lines, "```", ""])


def modules() -> str:
    """Return a table of every module, folder by folder."""
    lines = ["| module | what lives there |", "|---|---|"]
    for room, inside in rooms():
        for path in inside or [imports.PACKAGE / f"{room}.py"]:
            name = path.relative_to(ROOT)
            lines.append(f"| `{name}` | {first_sentence(path).replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def errors() -> str:
    """Return a table of every error of the library, where it is defined and what it means."""
    head = ["| error | is a | defined in | raised where |", "|---|---|---|---|"]
    paths = [p for room, inside in rooms() for p in inside or [imports.PACKAGE / f"{room}.py"]]
    return "\n".join([*head, *(_error_row(n, p) for p in paths for n in _errors_of(p)), ""])


def _errors_of(path: Path) -> Iterator[ast.ClassDef]:
    """Yield the classes of a module whose base is an error of the library."""
    known = {"MatryoshkafyError"} | {n.name for n in ast.parse(ERRORS.read_text()).body
                                     if isinstance(n, ast.ClassDef)}  # fmt: skip
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases & known or node.name == "MatryoshkafyError":
                yield node


def _error_row(node: ast.ClassDef, path: Path) -> str:
    base = node.bases[0].id if isinstance(node.bases[0], ast.Name) else ""
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).rstrip(".")
    return f"| `{node.name}` | `{base}` | `{path.relative_to(ROOT)}` | {text} |"


KINDS: Mapping[str, Callable[[], str]] = {
    "folders": folders,
    "modules": modules,
    "measures": measures.table,
    "errors": errors,
}
# Measures move with every line that is written: they are as old as the page says, not checked.
CHECKED = ("folders", "modules", "errors")


def filled(page: str, kinds: Collection[str] = tuple(KINDS)) -> str:
    """Return a page with its generated sections of these kinds written again."""

    def written(found: re.Match[str]) -> str:
        kind = found["kind"]
        return found[1] + KINDS[kind]() + found[3] if kind in kinds else found[0]

    return SECTION.sub(written, page)


def main(words: list[str]) -> int:
    """Write or check the pages; return the exit code."""
    behind = False
    for name in PAGES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        if "--check" in words:
            behind |= filled(old, CHECKED) != old
        else:
            path.write_text(filled(old), encoding="utf-8")
    return int(behind)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
