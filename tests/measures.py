"""What the house measures of itself, as a table: `python -m tests.measures`."""

from __future__ import annotations

import ast
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import imports
from tests.test_house import body_lines, uses_of_any


def sources() -> list[Path]:
    """Return the library's files."""
    return sorted(imports.PACKAGE.rglob("*.py"))


def code_lines(path: Path) -> int:
    """Return the lines that carry code: no blank line, no comment alone, no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr)) and not _is_docstring(node):
            lines.update((node.lineno, node.end_lineno or node.lineno))
    return len(lines)


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else node
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def comments(path: Path) -> int:
    """Return the lines that carry a comment; directives to tools do not count."""
    with path.open("rb") as file:
        found = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    tools = ("# noqa", "# type:", "# pyright:", "# pragma", "# fmt:")
    return len([t for t in found if not t.string.startswith(tools)])


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def repeated_names() -> int:
    """Return how many public names are defined in two or more modules."""
    homes: Counter[str] = Counter()
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = {node.name for node in tree.body if isinstance(node, kinds)}
        homes.update(n for n in names if not n.startswith("_"))
    return sum(count > 1 for count in homes.values())


def table() -> str:
    """Return the measures as a table."""
    files = sources()
    lengths = [len(p.read_text(encoding="utf-8").splitlines()) for p in files]
    code = sum(map(code_lines, files))
    bodies = [body_lines(f) for path in files for f in functions(path)]
    graph = imports.room_imports()
    anys = sum(map(uses_of_any, files))
    rows = [
        ("modules beside the folders", str(len(list(imports.PACKAGE.glob("[!_]*.py"))))),
        ("rooms by floors", str(max(imports.floors(graph).values()))),
        ("arrows between rooms", str(sum(map(len, graph.values())))),
        ("circles of imports", str(int(bool(imports.circle(imports.module_imports()))))),
        ("modules, of these over 400 lines", f"{len(files)}, {sum(n > 400 for n in lengths)}"),
        ("lines, lines of code", f"{sum(lengths):,}, {code:,}"),
        (
            "function body, median / p90 / max",
            f"{statistics.median(bodies):g} / {statistics.quantiles(bodies, n=10)[-1]:g} / "
            f"{max(bodies)}",
        ),
        ("`Any` per 1,000 lines", f"{1000 * anys / sum(lengths):.1f} ({anys})"),
        ("lines with a comment, % of code", f"{100 * sum(map(comments, files)) / code:.1f}"),
        ("public names defined twice or more", str(repeated_names())),
    ]
    head = ["| measure | here |", "|---|---:|"]
    return "\n".join([*head, *(f"| {name} | {value} |" for name, value in rows), ""])


if __name__ == "__main__":
    print(table())
