"""Casts of a forward: those to a type that its code names stay, all others follow the model.

A trace in float32 does not hold what is no cast there: x.float() around a norm, which half needs,
and x.to(h.dtype) are both x. The user's line tells them apart: it names a type, or asks for one.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F  # noqa: N812  as torch calls it

from matryoshkafy.graph.imports import parsed
from matryoshkafy.graph.literals import Scope, scope_at
from matryoshkafy.graph.nodes import TORCH_FOLDER, op_key
from matryoshkafy.graph.user_lines import line_of

aten = torch.ops.aten
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = {"float", "double", "half", *(str(t).removeprefix("torch.") for t in FLOATS)}
# An overload that no call of a cast to a type alone makes: it says that the line names the type.
NAMED = aten.to.dtype_layout
# What both kinds of casts are in a graph.
CAST_KEYS = ("to", "type_as")
# How the remark begins that a graph holds the answer of one type; its name follows.
ONE_TYPE = "computes as in "
GET_DTYPE: object = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
CASTS: frozenset[object] = frozenset(
    getattr(torch.Tensor, name)
    for name in ("to", "type", "type_as", "float", "double", "half", "bfloat16")
)
# Ops that compute in a type that they are given.
TYPED: frozenset[object] = frozenset(
    getattr(owner, name)
    for owner in (F, torch, torch.Tensor)
    for name in ("softmax", "log_softmax", "softmin", "sum", "mean", "cumsum", "prod", "cumprod")
    if hasattr(owner, name)
)


def cast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a cast or an op in a type; where the type is named it is an op of the trace in any case.

    What is cast to its own type is the value itself: without an alias of its own, whoever reads
    the value later would read the cast.
    """
    frame = _caller(func)
    x = args[0] if args else None
    if frame is None or not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        return func(*args, **kwargs)
    if func not in CASTS:
        return _in_type(func, args, kwargs, frame)
    given = func(aten.alias.default(x), *args[1:], **kwargs)
    if not isinstance(given, torch.Tensor):  # x.type() tells its name
        return given
    if given.dtype == x.dtype and _names(frame, func.__name__):
        return NAMED(given, dtype=x.dtype)
    return given


def _in_type(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], frame: FrameType
) -> Any:
    x, dtype = args[0], kwargs.get("dtype")
    if dtype != x.dtype or not _names(frame, func.__name__):
        return func(*args, **kwargs)
    raised = NAMED(aten.alias.default(x), dtype=dtype)
    return func(raised, *args[1:], **{k: v for k, v in kwargs.items() if k != "dtype"})


def is_named(node: fx.Node) -> bool:
    """Tell whether a node is a cast to a type that the user's line names."""
    return node.target is NAMED and node.kwargs.keys() == {"dtype"}


def raised(graph: fx.Graph, ours: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return what of a model's own values has a type that its code names, from a cast that names
    one up to the next that names none; for each the value that was cast.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in (n for n in graph.nodes if n in ours):
        # A parameter has the model's type; autocast may have lowered that of an activation.
        origins = (found[n] for n in node.all_input_nodes if n in found)
        above = min(origins, key=lambda n: n.op == "get_attr", default=None)
        if is_named(node):
            found[node] = above or node.all_input_nodes[0]
        elif above and op_key(node) not in CAST_KEYS:
            found[node] = above
    return found


def asks_type(x: torch.Tensor) -> str:
    """Return the remark on a line that compares the type of a value with a floating one, "" on
    any other that reads it.
    """
    frame = _caller(GET_DTYPE) if x.dtype in FLOATS else None
    if frame is None:
        return ""
    code = frame.f_code
    if not _compares(code, frame.f_lineno, _position(frame)):
        return ""
    place = line_of(code, frame.f_lineno)
    return f"{ONE_TYPE}{str(x.dtype).removeprefix('torch.')}, which the forward asks for at {place}"


def _caller(func: object) -> FrameType | None:
    """Return the frame of the user's code that calls a function, None where torch's own does."""
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    name = getattr(func, "__name__", "")
    own = ("__torch_function__", "handle_torch_function", "called", name)
    while frame is not None and frame.f_code.co_name in own and _is_ours_or_torchs(frame):
        frame = frame.f_back
    return None if frame is None or _is_ours_or_torchs(frame) else frame


def _is_ours_or_torchs(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(TORCH_FOLDER) or frame.f_globals.get("__package__") == __package__


Position = tuple[int | None, int | None, int | None, int | None]


def _position(frame: FrameType) -> Position | None:
    """Return where the expression that a frame computes begins and ends (from Python 3.11)."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return None
    return next((p for i, p in enumerate(positions()) if i == frame.f_lasti // 2), None)


def _names(frame: FrameType, name: str) -> bool:
    return _call_names(frame.f_code, frame.f_lineno, name, _position(frame))


@lru_cache(maxsize=4096)
def _call_names(code: CodeType, line: int, name: str, at: Position | None) -> bool:
    """Tell whether the call at a position names the type that it casts to."""
    found = [e for e in _expressions(code.co_filename, line, at) if isinstance(e, ast.Call)]
    calls = [call for call in found if ast.unparse(call.func).rpartition(".")[2] == name]
    scope = scope_at(code.co_filename, line)
    if scope is None or not calls:
        return False
    return name in NAMES or all(any(_is_type(e, scope) for e in _given(c)) for c in calls)


def _given(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(k.value for k in call.keywords)]


def _is_type(expression: ast.expr, scope: Scope, depth: int = 3) -> bool:
    """Tell whether an expression is torch.float32 or another floating type, by that name."""
    if isinstance(expression, ast.Attribute) and ast.unparse(expression.value) == "torch":
        return expression.attr in NAMES
    bound = scope.bindings(expression) if depth else []
    return bool(bound) and all(b.value and _is_type(b.value, b.scope, depth - 1) for b in bound)


@lru_cache(maxsize=4096)
def _compares(code: CodeType, line: int, at: Position | None) -> bool:
    """Tell whether the type that is read at a position is compared with a floating one, there or by
    the name that it is bound to.
    """
    scope = scope_at(code.co_filename, line)
    if scope is None:
        return False
    reads = _expressions(code.co_filename, line, at)
    wanted = {ast.unparse(e) for e in reads if isinstance(e, ast.Attribute) and e.attr == "dtype"}
    for place in scope.function:
        for node in ast.walk(place):
            if isinstance(node, ast.Assign) and ast.unparse(node.value) in wanted:
                wanted |= {ast.unparse(target) for target in node.targets}
        found = (node for node in ast.walk(place) if isinstance(node, ast.Compare))
        if any(_is_asked(compare, wanted, scope) for compare in found):
            return True
    return False


def _is_asked(compare: ast.Compare, wanted: set[str], scope: Scope) -> bool:
    sides = [side for s in (compare.left, *compare.comparators) for side in _alternatives(s)]
    known = any(ast.unparse(side) in wanted for side in sides)
    return known and any(_is_type(side, scope) for side in sides)


def _alternatives(side: ast.expr) -> Sequence[ast.expr]:
    """Return the members of (torch.float16, torch.bfloat16)."""
    return side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]


def _expressions(file: str, line: int, at: Position | None) -> list[ast.expr]:
    """Return the calls and attributes of a line; of a position alone where it is known."""
    found = _by_line(file).get(line, [])
    exact = [e for e in found if _place_of(e) == at]
    return exact or found


def _place_of(expression: ast.expr) -> Position:
    e = expression
    return (e.lineno, e.end_lineno, e.col_offset, e.end_col_offset)


@lru_cache(maxsize=64)
def _by_line(file: str) -> Mapping[int, list[ast.expr]]:
    found: dict[int, list[ast.expr]] = defaultdict(list)
    for node in _walked(file):
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            found[line].append(node)
    return found


def _walked(file: str) -> Iterator[ast.Call | ast.Attribute]:
    tree = parsed(file)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, (ast.Call, ast.Attribute)):
            yield node
