"""rebind(): functions in the copy of a model that closed over the model close over the copy.

A hook such as `lambda module, inputs: inputs[0] * self.gain` holds the model in a cell. A copy of
the model shares its functions, so that it would compute with the gain of the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

Copies = Mapping[int, object]


def rebind(twin: nn.Module, copies: Copies) -> None:
    """Replace such functions among the attributes and hooks of a copied model.

    Args:
        twin: the copy.
        copies: {id of an original: its copy}, what `copy.deepcopy` leaves as its memo.
    """
    # A table that could not be copied is the original's still.
    for table in (t for module in twin.modules() for t in _tables(module) if id(t) not in copies):
        for name, value in tuple(table.items()):
            if isinstance(value, FunctionType) and value.__closure__:
                table[name] = _again(value, copies)


def _tables(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Yield the attributes of a module, and its tables of hooks."""
    own = vars(module)
    yield own
    yield from [table for name, table in own.items() if name.endswith("_hooks") and table]


def _again(value: Any, copies: Copies) -> Any:
    """Return a function over copies of what it closes over; what closes over nothing is kept."""
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    held = [_contents(cell) for cell in value.__closure__]
    now = [_copy_of(content, copies) for content in held]
    if all(a is b for a, b in zip(held, now, strict=True)):
        return value
    cells = tuple(
        old if a is b else CellType(b)
        for old, a, b in zip(value.__closure__, held, now, strict=True)
    )
    new = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    new.__kwdefaults__, new.__qualname__ = value.__kwdefaults__, value.__qualname__
    new.__dict__.update(value.__dict__)
    return new


def _copy_of(content: Any, copies: Copies) -> Any:
    if isinstance(content, MethodType):
        owner = copies.get(id(content.__self__))
        return content if owner is None else MethodType(content.__func__, owner)
    return copies.get(id(content), _again(content, copies))


def _contents(cell: CellType) -> object:
    """Return what a cell holds; None of one that nothing was assigned to yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
