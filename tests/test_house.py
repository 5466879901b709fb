"""House style, measured: short bodies, shallow nesting, few parameters, errors that carry text.

What exceeds a limit stands in `KNOWN` with its measure; it may shrink, not grow, and nothing new
may join. `python -m tests.test_house` prints the offenders and the distribution.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("matryoshkafy", "cli", "examples", "docs")
LIMITS = {"body": 40, "nesting": 3, "parameters": 6, "module": 400, "bare raise": 0}
ANY_PER_THOUSAND = 12
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Signatures that are fixed, as public API or as options of a command.
KNOWN = {
    "cli/matryoshkafy_cli/converting.py:convert parameters": 14,
    "cli/matryoshkafy_cli/describing.py:info parameters": 9,
    "cli/matryoshkafy_cli/exporting.py:export parameters": 11,
    "cli/matryoshkafy_cli/inspecting.py:inspect parameters": 9,
    "cli/matryoshkafy_cli/packing.py:pack parameters": 8,
    "cli/matryoshkafy_cli/reporting.py:report parameters": 12,
    "cli/matryoshkafy_cli/slicing.py:slice_ parameters": 11,
    "cli/matryoshkafy_cli/verifying.py:verify parameters": 7,
    "cli/matryoshkafy_cli/cascading.py:cascade parameters": 10,
    "cli/matryoshkafy_cli/family.py:family parameters": 15,
    "cli/matryoshkafy_cli/retrieving.py:retrieve parameters": 13,
    "matryoshkafy/dolls/convert.py:convert parameters": 15,
    "matryoshkafy/dolls/convert.py:inspect parameters": 13,
    "matryoshkafy/kernels/norm_ops.py:norm parameters": 7,
    "matryoshkafy/losses/fused.py:nested_cross_entropy parameters": 11,
    "matryoshkafy/losses/matryoshka.py:__init__ parameters": 9,
    "matryoshkafy/losses/sampled.py:nested_sampled_softmax parameters": 12,
    "matryoshkafy/natives/saving.py:save parameters": 8,
    "matryoshkafy/natives/saving.py:save_native parameters": 7,
    "matryoshkafy/training/distil.py:distil parameters": 11,
    "matryoshkafy/units/rotate.py:rotate parameters": 7,
}


@dataclass(frozen=True)
class Measure:
    """One measured quantity of a place in the tree."""

    place: str
    kind: str
    value: int


def measures(path: Path) -> Iterator[Measure]:
    """Yield every measure of a file."""
    text = path.read_text(encoding="utf-8")
    name, tree = str(path.relative_to(ROOT)), ast.parse(text)
    yield Measure(name, "module", len(text.splitlines()))
    for node in ast.walk(tree):
        if isinstance(node, Function):
            place = f"{name}:{node.name}"
            yield Measure(place, "body", body_lines(node))
            yield Measure(place, "nesting", nesting(node.body))
            yield Measure(place, "parameters", parameters(node))
        if isinstance(node, ast.Raise) and is_bare(node):
            yield Measure(f"{name}:{node.lineno}", "bare raise", 1)


def compares_ops(path: Path) -> list[int]:
    """Return the lines that compare an op's key with names: those belong in its row."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and any(map(_is_text, ast.walk(node.value)))
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and any(isinstance(n, ast.Name) and n.id == "op_key" for n in ast.walk(node))
        and any(_is_text(n) or (isinstance(n, ast.Name) and n.id in named) for n in ast.walk(node))
    ]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def body_lines(node: Function) -> int:
    """Return the lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def nesting(statements: list[ast.stmt]) -> int:
    """Return how deep blocks stand in each other; an elif is as deep as its if."""
    return max((_depth(s) for s in statements), default=0)


def _depth(statement: ast.stmt) -> int:
    if isinstance(statement, Function | ast.ClassDef):
        return nesting(statement.body)
    if not isinstance(statement, BLOCKS):
        return 0
    inner = nesting(statement.body) + 1
    for branch in ("orelse", "finalbody"):
        other = getattr(statement, branch, [])
        chained = len(other) == 1 and isinstance(other[0], ast.If) and branch == "orelse"
        inner = max(inner, nesting(other) + (0 if chained else 1) if other else 0)
    return max([inner, *(nesting(h.body) + 1 for h in getattr(statement, "handlers", []))])


def parameters(node: Function) -> int:
    """Return how many arguments a function takes, without self and cls."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls")])


def is_bare(node: ast.Raise) -> bool:
    """Tell whether an error is raised without a word."""
    if isinstance(node.exc, ast.Call):
        return not node.exc.args and not node.exc.keywords
    return isinstance(node.exc, ast.Name) and node.exc.id[0].isupper()


def files() -> list[Path]:
    """Return the measured files."""
    return sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def offenders() -> dict[str, int]:
    """Return {"place kind": value} of everything past its limit."""
    found = (m for path in files() for m in measures(path))
    return {f"{m.place} {m.kind}": m.value for m in found if m.value > LIMITS[m.kind]}


def test_nothing_grows_past_the_limits() -> None:
    worse = {k: v for k, v in offenders().items() if v > KNOWN.get(k, 0)}
    assert not worse, "\n".join(f"{key}: {value}" for key, value in sorted(worse.items()))


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("def f():\n  '''Doc.'''\n  return 1", (1, 0, 0)),
        ("def f(a, *, b):\n  if a:\n    for x in b:\n      pass\n  return 1", (4, 2, 2)),
        ("def f(a):\n  if a:\n    x = 1\n  elif a > 1:\n    x = 2\n  return x", (5, 1, 1)),
        ("def f():\n  try:\n    x = 1\n  except OSError:\n    if x:\n      pass", (5, 2, 0)),
    ],
)
def test_the_measures_count_what_they_say(code: str, wanted: tuple[int, int, int]) -> None:
    node = ast.parse(code).body[0]
    assert isinstance(node, Function)
    assert body_lines(node) == wanted[0]
    assert nesting(node.body) == wanted[1]
    assert parameters(node) == wanted[2]


def test_only_graphs_and_rows_name_ops(tmp_path: Path) -> None:
    """What a stage asks of an op is a field of its row, so that `mk.rule` can say it, too."""
    library = ROOT / "matryoshkafy"
    later = [p for p in library.rglob("*.py") if p.parent.name not in ("graph", "rules")]
    found = {str(p.relative_to(ROOT)): lines for p in later if (lines := compares_ops(p))}
    assert not found, found
    code = tmp_path / "code.py"
    code.write_text("A = ('sum',)\nop_key(n) in A\nop_key(n) == 'sum'\nop_key(n) in OPS\n")
    assert compares_ops(code) == [2, 3]


def test_any_is_rare() -> None:
    """A type that says nothing stands only where another library's values have none to say."""
    library = ROOT / "matryoshkafy"
    paths = sorted(library.rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    used = {path: uses_of_any(path) for path in paths}
    most = sorted(used, key=lambda path: -used[path])[:5]
    told = ", ".join(f"{path.relative_to(ROOT)} {used[path]}" for path in most)
    assert 1000 * sum(used.values()) <= ANY_PER_THOUSAND * lines, told


def uses_of_any(path: Path) -> int:
    """Return how often a file says `Any`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def main() -> None:
    """Print the distribution and the offenders."""
    found = [m for path in files() for m in measures(path)]
    for kind in ("body", "nesting", "parameters", "module"):
        values = sorted(m.value for m in found if m.kind == kind)
        median, p90 = statistics.median(values), statistics.quantiles(values, n=10)[-1]
        print(f"{kind}: median {median:g}, p90 {p90:g}, max {values[-1]}")
    for key, value in sorted(offenders().items()):
        print(f"    {key!r}: {value},".replace("'", '"'))


if __name__ == "__main__":
    sys.exit(main())
