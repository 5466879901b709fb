"""formulas_of(): what a line of the user's computes of one size or name, read from its syntax.

math.sqrt(3 * d) is (3 * d) ** 0.5, also where d or the root is bound above, in the class or by a
function that returns it. With the number that the trace holds, a formula tells what d was.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import cast

import torch
from torch import fx

from matryoshkafy.graph.formula import OPAQUE, ROUND, Formula, combined, power_of, product_of
from matryoshkafy.graph.imports import function_named, parsed
from matryoshkafy.graph.literals import (
    PLACE,
    SIMPLE,
    Bound,
    Scope,
    around,
    scope_at,
    statements,
)
from matryoshkafy.graph.nodes import source_of

MODULES = {"math", "np", "numpy"}
LIBRARIES = MODULES | {"torch", "F", "nn"}
CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
SAME = {"float", "tensor", "as_tensor"}
ROUNDED = {"int", "round", "floor", "ceil", "max", "min", "divmod"}
ROOTS = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0}
NUMERIC = ("math.", "np.", "numpy.", "nn.init.", "torch.nn.init.", "init.")
OF_ITSELF = {"bit_length", "__index__", "__int__", "__float__"}
COUNTS = {"size", "numel", "nelement", "prod"}
NAMES = re.compile(r"[\w.]+")
DEPTH, MOST = 5, 12


def formulas_of(node: fx.Node) -> tuple[Formula, ...]:
    """Return the formulas of the statement that made a node; none where its line is not known."""
    return tuple(f for f in expressions_of(node) if not f.plain)


def expressions_of(node: fx.Node) -> tuple[Formula, ...]:
    """Return the formulas of a statement with its numbers and names as such."""
    return tuple(dict.fromkeys(f for each in _read_at(node).values() for f in each))


def attributes_of(node: fx.Node) -> Iterator[tuple[Formula, ...]]:
    """Yield the formulas of each attribute in the statement that made a node."""
    yield from (read for e, read in _read_at(node).items() if isinstance(e, ast.Attribute))


def function_of(node: fx.Node) -> ast.AST | None:
    """Return the function of the user's that made a node, None where it is not known."""
    place = PLACE.match(source_of(node) or "")
    return _function_at(place[1], int(place[2])) if place else None


@lru_cache(maxsize=4096)
def _function_at(file: str, line: int) -> ast.AST | None:
    scope = scope_at(file, line)
    return next(iter(scope.function), None) if scope else None


def _read_at(node: fx.Node) -> dict[ast.expr, tuple[Formula, ...]]:
    place = PLACE.match(source_of(node) or "")
    return _read_line(place[1], int(place[2])) if place else {}


@lru_cache(maxsize=4096)
def _read_line(file: str, line: int) -> dict[ast.expr, tuple[Formula, ...]]:
    """Return {expression of a line: its formulas}."""
    tree, scope = parsed(file), scope_at(file, line)
    if tree is None or scope is None:
        return {}
    reader = _Reader(scope)
    inner = [e for s in around(tree, SIMPLE, line) for e in ast.walk(s)]
    called = {e.func for e in inner if isinstance(e, ast.Call)}
    values = (e for e in inner if isinstance(e, ast.expr) and e not in called)
    made = (reader.made_with(e) for e in called if isinstance(e, ast.Attribute))
    return {e: reader.read(e) for e in values} | {e: f for each in made for e, f in each.items()}


@dataclass(frozen=True)
class _Read:
    """What an expression may be, read with so many names left to follow."""

    depth: int
    formulas: tuple[Formula, ...] = ()


@dataclass(frozen=True)
class _Reader:
    """Reads expressions where their names are bound; `given` are the arguments of a function."""

    scope: Scope
    given: Mapping[str, tuple[Formula, ...]] = field(default_factory=dict[str, tuple[Formula, ...]])
    depth: int = DEPTH
    seen: dict[ast.expr, _Read] = field(default_factory=dict[ast.expr, "_Read"])

    def read(self, e: ast.expr) -> tuple[Formula, ...]:
        """Return the formulas that an expression may be, none where it is no arithmetic."""
        # What was read with fewer names left to follow may be less than there is.
        if self.seen.get(e, _Read(-1)).depth < self.depth:
            self.seen[e] = _Read(DEPTH)  # what is computed of itself, as h = h + 1, is none
            try:
                found = dict.fromkeys(f for f in self._read(e) if f is not None)
            except OverflowError:
                found = dict[Formula, None]()
            self.seen[e] = _Read(self.depth, tuple(found)[:MOST])
        return self.seen[e].formulas

    def made_with(self, layer: ast.Attribute) -> dict[ast.expr, tuple[Formula, ...]]:
        """Return the formulas of what a layer was made with: self.act = nn.Softplus(width / 8)."""
        made = [b for b in self.scope.bindings(layer) if isinstance(b.value, ast.Call)]
        given: dict[ast.expr, tuple[Formula, ...]] = {}
        for bound in made:
            call, reader = cast("ast.Call", bound.value), replace(self, scope=bound.scope)
            if _called(call)[:1].isupper():
                values = (*call.args, *(k.value for k in call.keywords))
                given |= {e: tuple(filter(_of_one, reader.read(e))) for e in values}
        return given

    def _read(self, e: ast.expr) -> Iterable[Formula | None]:
        if isinstance(e, ast.Constant):
            return [Formula(float(e.value))] if type(e.value) in (int, float) else []  # type: ignore[arg-type]
        if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
            return [product_of(f, Formula(-1.0)) for f in self.read(e.operand)]
        if isinstance(e, ast.BinOp):
            sides = product(self.read(e.left), self.read(e.right))
            return [combined(e.op, left, right) or _unless_number(e) for left, right in sides]
        if isinstance(e, ast.BoolOp):
            return [f for value in e.values for f in self.read(value)]
        if isinstance(e, ast.IfExp):
            return [_opaque(e)] if _compares(e.test) else (*self.read(e.body), *self.read(e.orelse))
        if isinstance(e, ast.Call):
            return self._call(e)
        if isinstance(e, ast.Subscript):
            return self._entry(e)
        if isinstance(e, ast.NamedExpr):
            return self.read(e.value)
        return self._name(e) if isinstance(e, (ast.Name, ast.Attribute)) else []

    def _entry(self, e: ast.Subscript) -> Iterable[Formula]:
        """Return a size of a tensor, or what stands under a key of a dict, a list or a tuple."""
        if "shape" in ast.unparse(e.value) or _asks(e.value):
            return [_count(e)]
        held = [Bound(e.value, self.scope), *(self.scope.bindings(e.value) if self.depth else ())]
        entries = [(v, b.scope) for b in held for v in _entries(b.value, e.slice)]
        each = (replace(self, scope=s, depth=self.depth - 1).read(v) for v, s in entries)
        if entries:
            return [f for read in each for f in read]
        named = isinstance(e.slice, ast.Constant) and isinstance(e.slice.value, str)
        return [Formula(1.0, ((ast.unparse(e), 1.0),))] if named else []

    def _call(self, e: ast.Call) -> Iterable[Formula | None]:
        name = _called(e)
        if name in COUNTS:
            return [_count(e)]
        if name == "len":
            return [_count(e, ROUND)]
        if name == "getattr":
            return self._asked(e)
        if name == "calculate_gain":
            return [_gain(e)]
        read = [self.read(a) for a in e.args]
        if name in OF_ITSELF and isinstance(e.func, ast.Attribute):
            return [_opaque(e) for _ in self.read(e.func.value)]
        if name == "pow" and len(read) == 2:
            return [combined(ast.Pow(), a, b) or _opaque(e) for a, b in product(*read)]
        if name in ROOTS and len(read) == 1:
            return [power_of(f, ROOTS[name]) or _opaque(e) for f in read[0]]
        if name in SAME:
            return [f for each in read for f in each]
        leaves = [leaf for each in read for f in each for leaf, _ in f.leaves]
        unseen = [_opaque(e, leaves)] if leaves else []
        if ast.unparse(e.func).startswith(NUMERIC) or ast.unparse(e.func) in ROUNDED:
            return [*_of_numbers(name, read), *unseen]
        # An object of a class is no number.
        function = isinstance(e.func, ast.Name) and not name[:1].isupper()
        hidden = unseen if function or isinstance(e.func, ast.Subscript) else []
        return [*self._returned(name, e)] or hidden

    def _asked(self, e: ast.Call) -> Iterator[Formula]:
        """Yield what getattr(config, "units", default) may be."""
        if len(e.args) > 1 and isinstance(e.args[1], ast.Constant):
            yield from self.read(ast.Attribute(e.args[0], str(e.args[1].value), ast.Load()))
            yield from (f for default in e.args[2:] for f in self.read(default))

    def _returned(self, name: str, e: ast.Call) -> Iterator[Formula]:
        """Yield what a function of this file, or of one that it imports, returns for these
        arguments.
        """
        found, at = _functions(self.scope.module).get(name, []), self.scope
        if not found:
            found, at = self._elsewhere(ast.unparse(e.func))
        if len(found) != 1 or self.depth == 0:
            return
        names = [a.arg for a in found[0].args.args if a.arg != "self"]
        given = dict(zip(names, map(self.read, e.args), strict=False))
        given |= {k.arg: self.read(k.value) for k in e.keywords if k.arg}
        scope = replace(at, function=found)
        reader = _Reader(scope, {k: v for k, v in given.items() if v}, self.depth - 1, {})
        for node in ast.walk(found[0]):
            if isinstance(node, ast.Return) and node.value is not None:
                yield from reader.read(node.value)

    def _elsewhere(self, name: str) -> tuple[list[ast.FunctionDef], Scope]:
        """Return a function that the file imports, and where its names are bound."""
        file, line = function_named(self.scope.file, name)
        scope = scope_at(file, line) if file else None
        found = _functions(scope.module).get(name.rpartition(".")[2], []) if scope else []
        return found, scope or self.scope

    def _name(self, e: ast.Name | ast.Attribute) -> Iterable[Formula]:
        text = ast.unparse(e)
        if text in self.given:
            return self.given[text]
        if isinstance(e, ast.Attribute) and e.attr in CONSTANTS:
            return [Formula(CONSTANTS[e.attr])]
        if any(text in _rounds(f) for f in self.scope.function):
            return [Formula(1.0, ((ROUND + text, 1.0),))]
        bound = self.scope.bindings(e)
        values = [b for b in bound if b.value is not None]
        if isinstance(e, ast.Attribute):  # units=config.units says nothing of config.units
            values = [b for b in values if b.value and ast.unparse(b.value) != text]
        if values:
            return [f for b in values for f in self._bound(b, text)] if self.depth else []
        if isinstance(e, ast.Attribute) and (
            found := [*self._returned(e.attr, ast.Call(e, [], []))]
        ):
            return found  # a property
        return [Formula(1.0, ((text, 1.0),))] if self._may_count(e, bound) else []

    def _bound(self, to: Bound, name: str) -> Iterator[Formula]:
        """Yield what a name is; a whole number that was handed over stays a name."""
        # The arguments of a helper are those of no other function.
        reader = replace(self, scope=to.scope, depth=self.depth - 1)
        if list(to.scope.function) != list(self.scope.function):
            reader = replace(reader, given={})
        for found in reader.read(to.value) if to.value else ():
            width = to.handed and not found.leaves and found.coefficient.is_integer()
            yield Formula(1.0, ((name, 1.0),)) if width else found

    def _may_count(self, e: ast.expr, bound: list[Bound]) -> bool:
        """Tell whether a name of which no value is known may be a size: no argument of a forward,
        nothing of which an attribute is asked, which is a tensor.
        """
        if isinstance(e, ast.Attribute):
            text = ast.unparse(e)
            return NAMES.fullmatch(text) is not None and text.partition(".")[0] not in LIBRARIES
        names = {getattr(f, "name", "") for f in self.scope.function}
        inside = (n for f in self.scope.function for n in ast.walk(f))
        tensors = (ast.Attribute, ast.Subscript)
        asked = any(isinstance(n, tensors) and ast.dump(n.value) == ast.dump(e) for n in inside)
        return "forward" not in names and not asked


@lru_cache(maxsize=64)
def _functions(tree: ast.Module) -> dict[str, list[ast.FunctionDef]]:
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in statements(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


@lru_cache(maxsize=1024)
def _rounds(function: ast.AST) -> frozenset[str]:
    """Return the names that count the rounds of a loop; those of a loop over widths are widths."""
    loops = (n for n in ast.walk(function) if isinstance(n, (ast.For, ast.comprehension)))
    named = (n for loop in loops for counter in _counters(loop) for n in ast.walk(counter))
    return frozenset(n.id for n in named if isinstance(n, ast.Name))


def _counters(loop: ast.For | ast.comprehension) -> list[ast.expr]:
    over = _called(loop.iter) if isinstance(loop.iter, ast.Call) else ""
    if over == "enumerate" and isinstance(loop.target, ast.Tuple):
        return loop.target.elts[:1]
    return [loop.target] if over in ("range", "enumerate") else []


def _of_one(formula: Formula) -> bool:
    """Tell whether a formula computes something of one name: sizes are handed over as such."""
    return formula.known and not formula.plain and len(formula.leaves) == 1


def _compares(test: ast.expr) -> bool:
    """Tell whether a choice hangs on how large something is."""
    larger = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
    inner = (n for n in ast.walk(test) if isinstance(n, ast.Compare))
    return any(isinstance(op, larger) for n in inner for op in n.ops)


def _called(e: ast.Call) -> str:
    return ast.unparse(e.func).rpartition(".")[2]


def _gain(e: ast.Call) -> Formula:
    """Return torch's recommended gain of a nonlinearity, where the call holds its arguments."""
    given = [a.value for a in e.args if isinstance(a, ast.Constant)]
    try:
        known = len(given) == len(e.args) and not e.keywords
        return Formula(float(torch.nn.init.calculate_gain(*given))) if known else _opaque(e)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return _opaque(e)


def _entries(held: ast.expr | None, key: ast.expr) -> list[ast.expr]:
    """Return what stands under a key of a display; all where the key is not known."""
    if isinstance(held, ast.Dict):
        pairs = [*zip(held.keys, held.values, strict=True)]
        under = [v for k, v in pairs if k is not None and ast.dump(k) == ast.dump(key)]
        return under or [v for k, v in pairs if k is not None]
    if isinstance(held, (ast.List, ast.Tuple)):
        index = key.value if isinstance(key, ast.Constant) else None
        inside = type(index) is int and 0 <= index < len(held.elts)
        return [held.elts[index]] if inside else [*held.elts]  # type: ignore[index]
    if isinstance(held, ast.Call) and ast.unparse(held.func) == "dict":
        named = key.value if isinstance(key, ast.Constant) else None
        return [k.value for k in held.keywords if named in (None, k.arg)]
    return []


def _asks(e: ast.expr) -> bool:
    return isinstance(e, ast.Call) and _called(e) in COUNTS


def _count(e: ast.expr, kind: str = "") -> Formula:
    return Formula(1.0, ((kind + ast.unparse(e), 1.0),), counts=True)


def _opaque(e: ast.expr, leaves: Iterable[str] = ("",)) -> Formula:
    """A number that is computed of names in a way that no formula of ours says; of the rounds of a
    loop alone it counts them.
    """
    rounds = all(leaf.startswith(ROUND) for leaf in leaves)
    return Formula(1.0, (((ROUND if rounds else OPAQUE) + ast.unparse(e), 1.0),), counts=rounds)


def _of_numbers(name: str, read: list[tuple[Formula, ...]]) -> Iterator[Formula]:
    """Yield what a function of the math module makes of numbers."""
    function: Callable[..., float] | None = getattr(math, name, None)
    given = [[f.coefficient for f in each if not f.leaves] for each in read]
    if function is None or not read:
        return
    for numbers in product(*given):
        try:
            yield Formula(float(function(*numbers)))
        except (TypeError, ValueError, OverflowError):
            continue


def _unless_number(e: ast.BinOp) -> Formula | None:
    """Arithmetic of names that no formula says; of tensors it is none."""
    return None if isinstance(e.op, ast.MatMult) else _opaque(e)
