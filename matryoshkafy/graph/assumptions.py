"""assumed(): what torch.export assumed of the sizes of the inputs, as guards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from matryoshkafy.graph.guards import Apply, Expr, Guard, Size, fixed
from matryoshkafy.graph.nodes import TORCH_FOLDER, TRACING_FOLDER

# Sympy's and torch's functions of sizes, by their class; whatever else occurs in a guard fixes the
# sizes that it speaks of.
FUNCTIONS = {
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "And": "and",
    "Or": "or",
    "Not": "not",
    "Add": "add",
    "Mul": "mul",
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "Mod": "mod",
    "PythonMod": "mod",
    "Max": "max",
    "Min": "min",
}
# Assumptions on strides: the ops of the graph run again at every call, and see the real ones.
OF_STRIDES = {
    "check_contiguous_sizes_strides",
    "is_contiguous",
    "is_channels_last_contiguous_2d",
    "is_channels_last_contiguous_3d",
    "_is_non_overlapping_and_dense_or_false",
    "compute_elementwise_output_logical_to_physical_perm",
    "_reshape_view_helper_core_alg",
}

# Torch's symbols, guards and shape environment, and sympy's expressions: none of them is typed.
Symbolic = Any
Shapes = Sequence[Sequence[Symbolic]]
Places = Mapping[Symbolic, Size]


def assumed(inputs: Sequence[torch.Tensor]) -> tuple[Guard, ...]:
    """Return the guards of an exported graph, given the traced values of its tensor inputs.

    A size that stayed a number is fixed; sizes of one symbol are equal; each symbol has a range;
    every branch on sizes left a condition, with the user's line where torch knows it.
    """
    shapes = [value.shape for value in inputs]
    symbols = [n for shape in shapes for n in shape if isinstance(n, torch.SymInt)]
    env: Symbolic = symbols[0].node.shape_env if symbols else None
    places = {
        _raw(n): Size(i, d)
        for i, shape in enumerate(shapes)
        for d, n in enumerate(shape)
        if isinstance(n, torch.SymInt)
    }
    raised = tuple(env.guards) if env is not None else ()
    lines = {frozenset(guard.expr.args): _line(guard) for guard in raised}
    found = list(_of_shapes(shapes, lines))
    for guard in raised:
        found.extend(_of_condition(guard, places, env))
    found.extend(_of_ranges(env, places))  # last: a condition knows its line
    return tuple({guard.condition: guard for guard in reversed(found)}.values())[::-1]


def _raw(symbol: Symbolic) -> Symbolic:
    """The expression of a size before torch put numbers for symbols."""
    return symbol.node._expr


def example_only(inputs: Sequence[torch.Tensor], source: str) -> tuple[Guard, ...]:
    """Return the guards of a graph that holds for the sizes of the example alone."""
    return tuple(
        fixed(i, d, int(n), source) for i, x in enumerate(inputs) for d, n in enumerate(x.shape)
    )


def _of_shapes(shapes: Shapes, lines: Mapping[Symbolic, str]) -> Iterator[Guard]:
    """What the traced shapes say by themselves: numbers, and symbols met before."""
    first: dict[Symbolic, Size] = {}
    for i, shape in enumerate(shapes):
        for d, n in enumerate(shape):
            if not isinstance(n, torch.SymInt):
                yield fixed(i, d, int(n))
                continue
            node: Symbolic = n.node
            expr, own = node.expr, node._expr
            if expr.is_number:
                yield fixed(i, d, int(expr), lines.get(frozenset((own, expr)), ""))
            elif expr in first:
                yield Guard(
                    Apply("eq", (Size(i, d), first[expr])), lines.get(frozenset((own, expr)), "")
                )
            elif expr.is_symbol:
                first[expr] = Size(i, d)


def _of_ranges(env: Symbolic, places: Places) -> Iterator[Guard]:
    for symbol, size in places.items():
        bounds = env.var_to_range.get(symbol)
        if bounds is None or env.replace(symbol).is_number:
            continue
        # Every symbol is at least 2, which is torch's own: 0 and 1 are tried on the model.
        if bounds.lower.is_Integer and bounds.lower > 2:
            yield Guard(Apply("ge", (size, int(bounds.lower))))
        if bounds.upper.is_Integer:
            yield Guard(Apply("le", (size, int(bounds.upper))))


def _of_condition(guard: Symbolic, places: Places, env: Symbolic) -> Iterator[Guard]:
    frame = guard.sloc.framework_loc
    known = frame is not None and _name(frame) in OF_STRIDES
    if known or env.replace(guard.expr) is sympy.true:
        return
    try:
        condition = _expr(guard.expr, places)
    except KeyError:
        yield from _pinned(guard, places, env)
        return
    if isinstance(condition, Apply):
        yield Guard(condition, _line(guard))


def _pinned(guard: Symbolic, places: Places, env: Symbolic) -> Iterator[Guard]:
    """A condition that we cannot write down: its sizes stay as they are."""
    for symbol in guard.expr.free_symbols:
        if symbol in places:
            size = places[symbol]
            yield fixed(size.leaf, size.dim, int(env.size_hint(symbol)), _line(guard))


def _expr(expr: Symbolic, places: Places) -> Expr:
    """Raises KeyError for what is none of ours."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return places[expr]
    if expr.is_Pow and expr.exp.is_Integer and 0 < expr.exp <= 8:
        return Apply("mul", (_expr(expr.base, places),) * int(expr.exp))
    name = FUNCTIONS[type(expr).__name__]
    return Apply(name, tuple(_expr(arg, places) for arg in expr.args))


def _line(guard: Symbolic) -> str:
    """Return the user's line, "" where the code of torch or of the trace made it."""
    if guard.sloc.maybe_user_loc:
        return str(guard.sloc.maybe_user_loc)
    frame = guard.sloc.framework_loc
    if frame is None or isinstance(frame, str):
        return ""
    if frame.filename.startswith((TORCH_FOLDER, TRACING_FOLDER)):
        return ""
    return f"{frame.filename}:{frame.lineno} ({frame.name})"


def _name(frame: Symbolic) -> str:
    return "" if isinstance(frame, str) else frame.name
