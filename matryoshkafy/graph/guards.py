"""Guards: which sizes of the inputs a trace is right for, checked at every call.

A trace is one path through the user's code. `torch.export` notes what the path assumed of the
sizes of the inputs (`if length > 4`, `ids[:, :50]`, a loop over the batch); a path that was
recorded holds for the sizes of the example alone. Each assumption is a `Guard`: a small expression
over the sizes, as plain data, so that it travels into slices and files.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch

from matryoshkafy.errors import GuardError


@dataclass(frozen=True)
class Size:
    """The size of one dimension of one flat tensor input."""

    leaf: int
    dim: int


@dataclass(frozen=True)
class Apply:
    """An operation of `OPS` on expressions."""

    op: str
    args: tuple[Expr, ...]


Expr = int | Size | Apply


@dataclass(frozen=True)
class _Op:
    """How an operation is computed, how many arguments it takes, and how it is written."""

    compute: Callable[..., int]
    arity: int | None
    text: str


def _floordiv(a: int, b: int) -> int:
    return a // b


OPS: Mapping[str, _Op] = {
    "eq": _Op(operator.eq, 2, "{} == {}"),
    "ne": _Op(operator.ne, 2, "{} != {}"),
    "lt": _Op(operator.lt, 2, "{} < {}"),
    "le": _Op(operator.le, 2, "{} <= {}"),
    "gt": _Op(operator.gt, 2, "{} > {}"),
    "ge": _Op(operator.ge, 2, "{} >= {}"),
    "and": _Op(lambda *args: all(args), None, " and "),
    "or": _Op(lambda *args: any(args), None, " or "),
    "not": _Op(operator.not_, 1, "not {}"),
    "add": _Op(lambda *args: sum(args), None, " + "),
    "mul": _Op(lambda *args: math.prod(args), None, " * "),
    "floordiv": _Op(_floordiv, 2, "{} // {}"),
    "mod": _Op(operator.mod, 2, "{} % {}"),
    "max": _Op(max, None, "max, "),
    "min": _Op(min, None, "min, "),
}
# A guard has a line of the user's, or words.
LINE = re.compile(r":\d+")
RELATIONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not")
MAX_GUARDS, MAX_NODES, MAX_INT = 4096, 256, 2**63


@dataclass(frozen=True)
class Guard:
    """A condition on the sizes of the inputs, and the user's line that made it ("": unknown)."""

    condition: Apply
    source: str = ""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The dimensions that the condition speaks of, each once."""
        return tuple(dict.fromkeys(_sizes(self.condition)))

    @property
    def fixes(self) -> bool:
        """Whether the guard says that one dimension is one number."""
        args = self.condition.args
        return self.condition.op == "eq" and isinstance(args[0], Size) and isinstance(args[1], int)

    def holds(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Tell whether flat inputs of these shapes fulfil the condition."""
        try:
            return bool(value_of(self.condition, shapes))
        except ZeroDivisionError:
            return False


def fixed(leaf: int, dim: int, size: int, source: str = "") -> Guard:
    """Return the guard that one dimension has one size."""
    return Guard(Apply("eq", (Size(leaf, dim), size)), source)


@dataclass(frozen=True)
class Guards:
    """What a trace assumes of its flat tensor inputs.

    `names` as a person writes them (`batch['mask']`); `ranks` their numbers of dimensions; `kinds`
    "float", "complex", "int" or "bool"; `conditions` on their sizes.
    """

    names: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    conditions: tuple[Guard, ...] = ()

    def check(self, flat: Sequence[object]) -> None:
        """Raise `GuardError` for inputs outside of what was traced: input, dimension, range,
        line.
        """
        for i, (name, value) in enumerate(zip(self.names, flat, strict=False)):
            if not isinstance(value, torch.Tensor):
                raise GuardError(
                    f"argument {name!r} is a {type(value).__name__}; expected a tensor of "
                    f"{self.ranks[i]} dimensions, as in the example inputs"
                )
            if value.dim() != self.ranks[i]:
                raise GuardError(
                    f"argument {name!r} has the shape {list(value.shape)}; the model was traced "
                    f"with {self.ranks[i]} dimensions. Give as many, or convert again."
                )
            if kind_of(value) != self.kinds[i]:
                raise GuardError(
                    f"argument {name!r} holds {value.dtype}; the model was traced with "
                    f"{self.kinds[i]} values, and its forward may do something else with others. "
                    f"Give {self.kinds[i]} values, or convert again."
                )
        shapes = [value.shape for value in flat if isinstance(value, torch.Tensor)]
        for guard in self.conditions:
            if not guard.holds(shapes):
                raise GuardError(self._refusal(guard, shapes))

    def _refusal(self, guard: Guard, shapes: Sequence[Sequence[int]]) -> str:
        given = "; ".join(
            f"argument {self.names[s.leaf]!r} has size {int(shapes[s.leaf][s.dim])} in dimension "
            f"{s.dim}"
            for s in guard.sizes
        )
        fixed_at = "fixed at " if LINE.search(guard.source) else ""
        why = f" ({fixed_at}{guard.source})" if guard.source else ""
        return (
            f"{given}; the trace is right for {self.text(guard)} only{why}. Give inputs of such "
            "sizes, or convert again with example inputs of the sizes that you need."
        )

    def text(self, guard: Guard) -> str:
        """Return the condition as Python: "ids.shape[1] < 50"."""
        return _text(guard.condition, self.names)

    @cached_property
    def free(self) -> tuple[Size, ...]:
        """The dimensions that may differ from the example's, in order."""
        held = {g.sizes[0] for g in self.conditions if g.fixes}
        every = (Size(i, d) for i, rank in enumerate(self.ranks) for d in range(rank))
        return tuple(size for size in every if size not in held)

    def with_fixed(self, sizes: Mapping[Size, int], source: str) -> Guards:
        """Return the guards with these dimensions fixed; what said more of one is replaced."""
        kept = (g for g in self.conditions if not (set(g.sizes) <= sizes.keys() and _is_bound(g)))
        new = (fixed(s.leaf, s.dim, n, source) for s, n in sizes.items())
        return replace(self, conditions=(*kept, *new))

    def resized(self, sizes: Mapping[Size, int]) -> Guards:
        """Return the guards of a sub-model whose inputs have these sizes where they were fixed."""

        def moved(guard: Guard) -> Guard:
            size = guard.sizes[0]
            if not guard.fixes or size not in sizes:
                return guard
            return fixed(size.leaf, size.dim, sizes[size], guard.source)

        return replace(self, conditions=tuple(map(moved, self.conditions)))

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        conditions = [[_to_json(g.condition), g.source] for g in self.conditions]
        return {
            "names": list(self.names),
            "ranks": list(self.ranks),
            "kinds": list(self.kinds),
            "conditions": conditions,
        }

    @staticmethod
    def from_dict(saved: object) -> Guards:
        """Return what `to_dict` wrote; raises `GuardError` for anything else."""
        fields = cast("dict[str, object]", saved) if isinstance(saved, dict) else {}
        names, ranks, kinds, conditions = (
            _listed(fields.get(key)) for key in ("names", "ranks", "kinds", "conditions")
        )
        sound = (
            len(names) == len(ranks) == len(kinds)
            and all(isinstance(n, str) for n in names)
            and all(type(r) is int and 0 <= r <= 64 for r in ranks)
            and all(k in KINDS.values() for k in kinds)
        )
        if not sound:
            raise _damaged(cast("object", saved))
        read = tuple(_guard(item, ranks) for item in conditions)
        return Guards(tuple(names), tuple(ranks), tuple(kinds), read)


KINDS = {0: "int", 1: "float", 2: "complex", 3: "bool"}


def kind_of(tensor: torch.Tensor) -> str:
    """Return "float", "complex", "int" or "bool": what a forward may branch on."""
    if tensor.dtype == torch.bool:
        return "bool"
    if tensor.dtype.is_complex:
        return "complex"
    return "float" if tensor.dtype.is_floating_point else "int"


def _is_bound(guard: Guard) -> bool:
    """Tell whether a guard compares a size with a number."""
    args = guard.condition.args
    return guard.condition.op in RELATIONS[:6] and {type(a) for a in args} == {Size, int}


def _sizes(expr: Expr) -> Iterator[Size]:
    if isinstance(expr, Size):
        yield expr
    elif isinstance(expr, Apply):
        for arg in expr.args:
            yield from _sizes(arg)


def value_of(expr: Expr, shapes: Sequence[Sequence[int]]) -> int:
    """Return what an expression comes to for flat inputs of these shapes."""
    if isinstance(expr, Size):
        return shapes[expr.leaf][expr.dim]
    if isinstance(expr, Apply):
        return OPS[expr.op].compute(*(value_of(arg, shapes) for arg in expr.args))
    return expr


def _text(expr: Expr, names: Sequence[str]) -> str:
    if isinstance(expr, Size):
        return f"{names[expr.leaf]}.shape[{expr.dim}]"
    if not isinstance(expr, Apply):
        return str(expr)
    words = [_text(arg, names) for arg in expr.args]
    if expr.op in ("max", "min"):
        return f"{expr.op}({', '.join(words)})"
    inner = [f"({w})" if " " in w and isinstance(a, Apply) and a.op not in ("max", "min") else w
             for w, a in zip(words, expr.args, strict=True)]  # fmt: skip
    form = OPS[expr.op].text
    return form.format(*inner) if "{}" in form else form.join(inner)


def _to_json(expr: Expr) -> object:
    if isinstance(expr, Size):
        return {"leaf": expr.leaf, "dim": expr.dim}
    if isinstance(expr, Apply):
        return [expr.op, *map(_to_json, expr.args)]
    return int(expr)


def _guard(saved: object, ranks: Sequence[int]) -> Guard:
    pair = _listed(saved)
    if len(pair) != 2 or not isinstance(pair[1], str):
        raise _damaged(saved)
    condition = _from_json(pair[0], ranks, [MAX_NODES])
    if not isinstance(condition, Apply) or condition.op not in RELATIONS:
        raise _damaged(saved)
    return Guard(condition, pair[1])


def _from_json(saved: object, ranks: Sequence[int], left: list[int]) -> Expr:
    left[0] -= 1
    if type(saved) is int and abs(saved) < MAX_INT:
        return saved
    if isinstance(saved, dict):
        return _size(cast("dict[str, object]", saved), ranks)
    if isinstance(saved, list) and left[0] > 0:
        op, *args = cast("list[Any]", saved) or [None]
        row = OPS.get(op) if isinstance(op, str) else None
        if row is not None and len(args) == (row.arity or max(2, len(args))):
            return Apply(op, tuple(_from_json(arg, ranks, left) for arg in args))
    raise _damaged(cast("object", saved))


def _size(saved: dict[str, object], ranks: Sequence[int]) -> Size:
    leaf, dim = saved.get("leaf"), saved.get("dim")
    if type(leaf) is not int or type(dim) is not int or saved.keys() != {"leaf", "dim"}:
        raise _damaged(saved)
    if not (0 <= leaf < len(ranks) and 0 <= dim < ranks[leaf]):
        raise _damaged(saved)
    return Size(leaf, dim)


def _listed(saved: object) -> list[Any]:
    listed = cast("list[Any]", saved) if isinstance(saved, list) else []
    if not isinstance(saved, list) or len(listed) > MAX_GUARDS:
        raise _damaged(cast("object", saved))
    return listed


def _damaged(saved: object) -> GuardError:
    return GuardError(
        f"the guards of the inputs hold {repr(saved)[:80]}, which is none of ours; the file is "
        "damaged, or was written by a newer version."
    )
