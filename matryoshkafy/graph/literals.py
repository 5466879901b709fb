"""written_out(), computed(), stated(), takes_root(): whether the user's code holds a number as
such, or computes it.

x * 0.25 scales by a quarter at every width, and so does x * step where step = 1 / 4 stands above;
x * d ** -0.5 does so where d is 16 alone.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TypeVar

from torch import fx

from matryoshkafy.graph.constructed import argument, calls_of, keywords
from matryoshkafy.graph.imports import classes_binding, parsed
from matryoshkafy.graph.nodes import source_of

PLACE = re.compile(r"(.+):(\d+) \(")
COMPUTES = re.compile(r"\*\*|sqrt|pow")
SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
NONE: frozenset[float] = frozenset()
MOST = 8  # numbers that one name may stand for
SETTERS = {"setattr", "__setattr__", "register_buffer"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b if b else math.nan,
    ast.Pow: lambda a, b: a**b if a > 0 and abs(b) <= 4 else math.nan,
}


def written_out(node: fx.Node, value: float) -> bool:
    """Tell whether the statement that made a node multiplies or divides by a number as written.

    A statement that also takes a root or a power may have computed it: that is no proof.
    """
    line = _line_of(node)
    return not line.rooted and any(math.isclose(value, n) for n in line.factors)


def takes_root(node: fx.Node, value: float) -> bool:
    """Tell whether the statement that made a node takes a root or a power, and does not hold a
    number, which it may have computed so.
    """
    return _line_of(node).rooted and not stated(node, [value])


def computed(node: fx.Node, values: Iterable[float]) -> bool:
    """Tell whether the statement that made a node is known, and holds none of some numbers.

    Nor a name of one: side = 3 above it is as good as the 3.
    """
    said = _line_of(node).said
    return bool(said) and said.isdisjoint(map(float, values))


def stated(node: fx.Node, values: Iterable[float]) -> bool:
    """Tell whether the statement that made a node holds all of some numbers, or names of them."""
    wanted = set(map(float, values))
    return bool(wanted) and wanted <= _line_of(node).said


@dataclass(frozen=True)
class _Line:
    """What the statements of a line hold: the numbers by which they multiply or divide, all that
    their expressions stand for (None among them where it is not known; nothing where the line is
    not), and whether they take a root or a power.
    """

    factors: frozenset[float] = frozenset()
    said: frozenset[float | None] = frozenset()
    rooted: bool = False


def _line_of(node: fx.Node) -> _Line:
    place = PLACE.match(source_of(node) or "")
    return _line(place[1], int(place[2])) if place else _Line()


@lru_cache(maxsize=4096)
def _line(file: str, line: int) -> _Line:
    tree, scope = parsed(file), scope_at(file, line)
    if tree is None or scope is None:
        return _Line()
    statements = around(tree, SIMPLE, line)
    inner = (e for s in statements for e in ast.walk(s) if isinstance(e, ast.expr))
    return _Line(
        factors=frozenset(n for s in statements for n in _factors(s, scope)),
        said=frozenset(n for e in inner for n in _numbers(e, scope) or [None]),
        rooted=any(COMPUTES.search(ast.unparse(s)) for s in statements),
    )


def scope_at(file: str, line: int) -> Scope | None:
    """Return where the names of a line are bound, None where the file is not known."""
    tree = parsed(file)
    if tree is None:
        return None
    function, owner = _holding(tree, FUNCTIONS, line), around(tree, (ast.ClassDef,), line)[:1]
    return Scope(tree, function, owner, file)


@lru_cache(maxsize=64)
def statements(tree: ast.Module) -> list[ast.AST]:
    """Return the simple statements, functions and classes of a file."""
    return [s for s in ast.walk(tree) if isinstance(s, (*SIMPLE, *FUNCTIONS, ast.ClassDef))]


Place = TypeVar("Place", bound=ast.stmt | ast.Lambda)


def around(tree: ast.Module, kinds: tuple[type[Place], ...], line: int) -> list[Place]:
    """Return the innermost statements of some kinds that hold a line."""
    around = _holding(tree, kinds, line)
    return [s for s in around if s.lineno == around[0].lineno]


def _holding(tree: ast.Module, kinds: tuple[type[Place], ...], line: int) -> list[Place]:
    """Return the statements of some kinds that hold a line, the innermost first."""
    found = (s for s in statements(tree) if isinstance(s, kinds))
    around = [s for s in found if s.lineno <= line <= (s.end_lineno or s.lineno)]
    return sorted(around, key=lambda s: -s.lineno)


@dataclass(frozen=True)
class Scope:
    """Where the names of a statement are bound: its functions, its class, its module."""

    module: ast.Module
    function: Sequence[ast.AST]
    owner: Sequence[ast.AST]
    file: str = ""

    def bindings(self, name: ast.expr) -> list[Bound]:
        """Return what a name or an attribute is bound to: of a name in its function or module, of
        an attribute in its class, else in any class of the module (a configuration), else in
        bases and classes that it imports.
        """
        if isinstance(name, ast.Attribute):
            return self._attribute(name.attr)
        if not isinstance(name, ast.Name):
            return []
        places = (_names(place).get(name.id, ()) for place in (*self.function, self.module))
        found = next(filter(None, places), ())
        handed = any(name.id in _argument_names(f) for f in self.function)
        return [*(Bound(value, self, handed) for value in found), *self._given(name.id)]

    def _given(self, name: str) -> Iterator[Bound]:
        """Yield what is handed over as an argument: to the __init__ of a class by the calls that
        make it, to any other function by those of its file.
        """
        for function in (f for f in self.function if isinstance(f, ast.FunctionDef)):
            named = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            keyword = name in [a.arg for a in function.args.kwonlyargs]
            if name in named or keyword:
                index = named.index(name) if name in named else None
                yield from self._handed(function, name, index)
                return

    def _handed(self, function: ast.FunctionDef, name: str, index: int | None) -> Iterator[Bound]:
        owner = [o for o in self.owner if isinstance(o, ast.ClassDef) and function in o.body]
        made = owner[0].name if owner and function.name == "__init__" else ""
        if not made and function.name in ("forward", "__init__"):
            return  # no name stands where it is called
        before = index - 1 if owner and index is not None else index  # self
        for file, call in calls_of(self.file, made or function.name, everywhere=bool(made)):
            for value in argument(call, name, before):
                yield from _bound_at(value, file, call)

    def _attribute(self, name: str) -> list[Bound]:
        own = self._of_classes(name, self.owner)
        if own:
            return own
        # Whose attribute it is, is not known: that of any class that the file can see.
        seen = [*self._of_classes(name, _classes(self.module)), *self._imported(name)]
        return seen or self._named(name)

    def _of_classes(self, name: str, owners: Sequence[ast.AST]) -> list[Bound]:
        return [
            Bound(value, replace(self, function=[place], owner=[owner]))
            for owner in owners
            for value, place in _attributes(owner).get(name, ())
        ]

    def _named(self, name: str) -> list[Bound]:
        """Return what a call hands over by the name, as a configuration is made: C(scale=0.1)."""
        given = keywords(self.module).get(name, ())
        return [b for value, call in given for b in _bound_at(value, self.file, call)]

    def _imported(self, name: str) -> list[Bound]:
        owner = next((o.name for o in self.owner if isinstance(o, ast.ClassDef)), "")
        for file, named in classes_binding(self.file, owner, name):
            tree = parsed(file)
            found = [] if tree is None else [(tree, c) for c in _classes(tree) if c.name == named]
            for module, each in found:
                bound = _attributes(each).get(name, ()) or _returned(each, name)
                if bound:
                    return [Bound(v, Scope(module, [at], [each], file)) for v, at in bound]
        return []


@dataclass(frozen=True)
class Bound:
    """What a name is bound to, None for a binding of an unknown kind, and where that is read.

    A whole number that is `handed` to a constructor may be a width.
    """

    value: ast.expr | None
    scope: Scope
    handed: bool = False

    def numbers(self, depth: int) -> frozenset[float]:
        """Return the numbers that may be bound; none where one is not known, or may be a width."""
        numbers = _numbers(self.value, self.scope, depth) if self.value else NONE
        typed = isinstance(self.value, ast.Constant) and type(self.value.value) is float  # 1.0
        width = self.handed and not typed and any(number.is_integer() for number in numbers)
        return NONE if width else numbers


def _argument_names(function: ast.AST) -> set[str]:
    given = getattr(function, "args", None)
    return {a.arg for a in ast.walk(given) if isinstance(a, ast.arg)} if given else set()


def _bound_at(value: ast.expr, file: str, call: ast.Call) -> list[Bound]:
    scope = scope_at(file, call.lineno)
    return [Bound(value, scope, handed=True)] if scope is not None else []


# What a file binds is asked for each name of a line: once read, it is looked up.
@lru_cache(maxsize=64)
def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in statements(tree) if isinstance(node, ast.ClassDef)]


@lru_cache(maxsize=4096)
def _names(place: ast.AST) -> dict[str, list[ast.expr | None]]:
    """Return {name: what a place binds it to}."""
    found: dict[str, list[ast.expr | None]] = {}
    for target, value in _bound(place):
        found.setdefault(target, []).append(value)
    return found


@lru_cache(maxsize=4096)
def _attributes(owner: ast.AST) -> dict[str, list[tuple[ast.expr | None, ast.AST]]]:
    """Return {attribute: what a class and its methods bind it to, and where}."""
    found: dict[str, list[tuple[ast.expr | None, ast.AST]]] = {}
    for place in _bodies(owner):
        for target, value in _bound(place):
            leaf = target.rpartition(".")[2]
            if target != leaf or place is owner:
                known = _unless_whole(value) if place is owner else value
                found.setdefault(leaf, []).append((known, place))
    return found


def _returned(owner: ast.ClassDef, name: str) -> list[tuple[ast.expr | None, ast.AST]]:
    """Return what a property of a class may be, and where."""
    held = [f for f in owner.body if isinstance(f, ast.FunctionDef) and f.name == name]
    return [(n.value, f) for f in held for n in ast.walk(f) if isinstance(n, ast.Return)]


def _bodies(owner: ast.AST) -> Iterator[ast.AST]:
    """Yield the methods of a class, and the class for what it binds outside of them."""
    body = getattr(owner, "body", [])
    yield from (node for node in body if isinstance(node, FUNCTIONS))
    yield owner


def _bound(place: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield every name that is bound, with its value where an assignment or a default gives one."""
    plain: set[ast.expr] = set()
    for node in _own(place):
        if isinstance(node, ast.arguments):
            yield from _arguments(node)
        elif isinstance(node, (ast.Name, ast.Attribute)) and node not in plain:
            yield from [(ast.unparse(node), None)] if isinstance(node.ctx, ast.Store) else ()
        else:
            pairs = list(_assigned(node))
            plain.update(target for target, _ in pairs)
            yield from ((ast.unparse(target), value) for target, value in pairs)


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield what a statement or an expression binds, and to what."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _pairs(target, node.value)
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, ast.AugAssign):
        yield node.target, ast.BinOp(node.target, node.op, node.value)
    elif isinstance(node, ast.Call):
        yield from _by_call(node)


def _by_call(call: ast.Call) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield what setattr(self, "scale", value) and self.register_buffer("scale", value) bind."""
    named = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    owner = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    args = [*owner, *call.args] if named == "register_buffer" else call.args
    if named in SETTERS and len(args) > 2 and isinstance(args[1], ast.Constant):
        yield ast.Attribute(args[0], str(args[1].value), ast.Store()), args[2]


def _own(place: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a place; of a class or a module those outside of its functions."""
    inner = (*FUNCTIONS, ast.ClassDef)
    whole = isinstance(place, FUNCTIONS)
    todo = [place]
    while todo:
        node = todo.pop()
        yield node
        held = ast.iter_child_nodes(node)
        todo.extend(n for n in held if whole or not isinstance(n, inner))


def _unless_whole(value: ast.expr | None) -> ast.expr | None:
    """Return a default, or what a class binds; None for a whole number, which may be a width."""
    whole = isinstance(value, ast.Constant) and isinstance(value.value, int)
    return None if whole else value


def _arguments(given: ast.arguments) -> Iterator[tuple[str, ast.expr | None]]:
    ordered = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*given.defaults]
    pairs = [
        *zip(reversed(ordered), [*reversed(defaults), *[None] * len(ordered)], strict=False),
        *zip(given.kwonlyargs, given.kw_defaults, strict=True),
    ]
    for named, default in pairs:
        yield named.arg, _unless_whole(default)
    for named in (given.vararg, given.kwarg):
        yield from [(named.arg, None)] if named else ()


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield each name with its own value: a, b = 1, 2."""
    if not isinstance(target, ast.Tuple):
        yield target, value
    elif isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
        for each, one in zip(target.elts, value.elts, strict=True):
            yield from _pairs(each, one)
    elif isinstance(value, ast.Call) and not _sizes(value):
        yield from ((each, value) for each in target.elts)  # a, b = divmod(c, d)
    elif _sizes(value):
        for i, each in enumerate(target.elts):
            yield each, ast.Subscript(value, ast.Constant(i))


def _sizes(value: ast.expr) -> bool:
    """Tell whether an expression asks a tensor for all of its sizes."""
    asked = value.func if isinstance(value, ast.Call) and not value.args else value
    return isinstance(asked, ast.Attribute) and asked.attr in ("shape", "size")


def _factors(statement: ast.stmt, scope: Scope) -> Iterator[float]:
    """Yield the numbers by which a statement multiplies or divides."""
    for node in ast.walk(statement):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
            yield from (n for side in (node.left, node.right) for n in _numbers(side, scope))


def _names_in(expression: ast.expr) -> bool:
    return any(isinstance(e, (ast.Name, ast.Attribute)) for e in ast.walk(expression))


def _numbers(side: ast.expr, scope: Scope, depth: int = 4) -> frozenset[float]:
    """Return the numbers that an expression of literals may stand for (a default, and what is
    handed over instead); none where one of them is not known.
    """
    if isinstance(side, ast.Constant):
        known = type(side.value) in (int, float)
        return frozenset([float(side.value)]) if known else NONE  # type: ignore[arg-type]
    if isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.USub):
        return frozenset(-n for n in _numbers(side.operand, scope, depth))
    if isinstance(side, ast.BinOp) and isinstance(side.op, ast.Pow) and _names_in(side):
        return NONE  # a root of what is named is one of a width as well
    if isinstance(side, ast.BinOp):
        compute = ARITHMETIC.get(type(side.op))
        sides = product(*(_numbers(s, scope, depth) for s in (side.left, side.right)))
        return frozenset(compute(a, b) for a, b in sides) if compute else NONE
    found = [b.numbers(depth - 1) for b in (scope.bindings(side) if depth else ())]
    every = frozenset(n for each in found for n in each)
    return every if all(found) and len(every) <= MOST else NONE
