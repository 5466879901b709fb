"""Every public name is documented so that the reference shows its parameters as a table.

Read from the source: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "matryoshkafy"
# Packages whose __init__ is a front door of its own.
DOORS = ("losses", "serving", "training")
Definition = ast.FunctionDef | ast.ClassDef


@cache
def tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return ast.parse((file if file.exists() else path / "__init__.py").read_text())


def exported(module: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what a front door hands on."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matryoshkafy."):
            for alias in node.names:
                if not (alias.asname or alias.name).startswith("_"):
                    yield node.module or "", alias.name


def shown() -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what the pages of the reference show."""
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for block in re.split(r"^::: ", page.read_text(), flags=re.M)[1:]:
            place = block.split()[0]
            members = re.search(r"members: \[([^\]]*)\]", block)
            if not (ROOT / (place.replace(".", "/") + ".py")).exists() and "." in place:
                head, _, last = place.rpartition(".")
                package = ROOT / place.replace(".", "/") / "__init__.py"
                if not package.exists():
                    yield head, last
                    continue
            for name in re.findall(r"\w+", members.group(1)) if members else ():
                yield place, name


def home(module: str, name: str) -> tuple[str, Definition] | None:
    """Return where a name is defined, through re-exports."""
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matryoshkafy"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return home(node.module or "", alias.name)
    return None


def public() -> dict[str, Definition]:
    """Return every documented function and class by its full name."""
    names = [*exported("matryoshkafy"), *shown()]
    for door in DOORS:
        names += exported(f"matryoshkafy.{door}")
    found = (home(*each) for each in names)
    return {f"{module}.{node.name}": node for module, node in filter(None, found)}


def parameters(node: Definition) -> list[str]:
    """Return what a caller may give: arguments of a function, of an __init__, or fields."""
    if isinstance(node, ast.FunctionDef):
        return arguments(node)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return arguments(item)
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return []
    fields = (i for i in node.body if isinstance(i, ast.AnnAssign))
    return [ast.unparse(f.target) for f in fields if not ast.unparse(f.target).startswith("_")]


def arguments(function: ast.FunctionDef) -> list[str]:
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    named += [starred for starred in (a.vararg, a.kwarg) if starred]
    given = (n.arg for n in named if not n.arg.startswith("_"))
    return [name for name in given if name not in ("self", "cls")]


def told(node: Definition) -> list[str]:
    """Return the names in the Args: sections of a docstring, an __init__'s among them."""
    texts = [ast.get_docstring(node) or ""]
    if isinstance(node, ast.ClassDef):
        inits = [i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"]
        texts += [ast.get_docstring(i) or "" for i in inits]
    return [name for text in texts for name in section(text)]


def section(text: str) -> Iterator[str]:
    found = re.search(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n?|\n)+)", text, flags=re.M)
    for line in (found.group(1) if found else "").splitlines():
        entry = re.match(r"    (\w+(?:, \w+)*)(?: \([^)]*\))?: ", line)
        yield from entry.group(1).split(", ") if entry else ()


@pytest.mark.parametrize("name", sorted(public()))
def test_every_parameter_is_in_the_table(name: str) -> None:
    node = public()[name]
    assert ast.get_docstring(node), f"{name} has no docstring"
    missing = [p for p in parameters(node) if p not in told(node)]
    assert not missing, f"{name}: the docstring's Args: lacks {', '.join(missing)}"


def test_what_is_told_exists() -> None:
    wrong = {
        name: [p for p in told(node) if parameters(node) and p not in parameters(node)]
        for name, node in public().items()
    }
    assert {name: extra for name, extra in wrong.items() if extra} == {}


@pytest.mark.parametrize("door", ["matryoshkafy", *(f"matryoshkafy.{d}" for d in DOORS)])
def test_what_a_door_hands_on_is_shown_in_the_reference(door: str) -> None:
    found = (home(*each) for each in shown())
    pages = {f"{module}.{node.name}" for module, node in filter(None, found)}
    names = filter(None, (home(*each) for each in exported(door)))
    # The page of errors is generated and lists every one of them.
    missing = [n.name for m, n in names if f"{m}.{n.name}" not in pages and not is_error(n)]
    assert missing == []


def is_error(node: Definition) -> bool:
    return isinstance(node, ast.ClassDef) and any("Error" in ast.unparse(b) for b in node.bases)
