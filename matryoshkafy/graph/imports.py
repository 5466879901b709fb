"""classes_binding(), function_named(), users_of(): what a file has of other files of its process.

A configuration, a base class or a helper often stands in a file beside the model's. What the file
imported is asked of its module, and read as syntax only where it may hold what is looked for.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType

# Of files that use a class are read; of those that use the layer of a library there are hundreds.
FEW = 4
# Says nothing of anybody's widths.
FOREIGN = {"torch", "builtins", "typing", "abc", "enum"}


@lru_cache(maxsize=64)
def parsed(file: str) -> ast.Module | None:
    """Return the syntax of a file, None where it cannot be read."""
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


@lru_cache(maxsize=4096)
def classes_binding(file: str, owner: str, attribute: str) -> tuple[tuple[str, str], ...]:
    """Return (file, name) of the classes elsewhere that bind an attribute.

    Args:
        file: that uses it.
        owner: the class in `file` whose bases are asked first; "" outside of a class.
        attribute: which is not bound in `file`.
    """
    names = _names_of(file)
    known = [c for c in names.values() if isinstance(c, type)]
    bases = names.get(owner)
    ordered = dict.fromkeys([*(bases.__mro__ if isinstance(bases, type) else ()), *known])
    found = ((_file_of(c.__module__), c) for c in ordered if _binds(c, attribute))
    return tuple((path, c.__name__) for path, c in found if path not in ("", file))


@lru_cache(maxsize=4096)
def function_named(file: str, name: str) -> tuple[str, int]:
    """Return the file and the line of a function that `file` imports, ("", 0) of any other.

    Args:
        file: that calls it.
        name: as it is called there: scale_of, or helpers.scale_of.
    """
    owner, _, leaf = name.rpartition(".")
    names = _names_of(file)
    held = names.get(owner) if owner else None
    found = (vars(held) if isinstance(held, ModuleType) else {} if owner else names).get(leaf)
    if not isinstance(found, FunctionType) or _foreign(found.__module__):
        return "", 0
    return found.__code__.co_filename, found.__code__.co_firstlineno


@lru_cache(maxsize=1024)
def users_of(file: str, name: str) -> tuple[str, ...]:
    """Return the files that hold the class `name` of `file`, this one first; no more than a few."""
    made = _names_of(file).get(name)
    using = [names for _, names in _held() if made is not None and names.get(name) is made]
    files = (names.get("__file__") for names in using)
    return tuple(dict.fromkeys((file, *(f for f in files if isinstance(f, str)))))[:FEW]


def _names_of(file: str) -> Mapping[str, object]:
    return getattr(sys.modules.get(_module_of(file)), "__dict__", {})


@lru_cache(maxsize=64)
def _module_of(file: str) -> str:
    return next((name for name, held in _held() if held.get("__file__") == file), "")


def _held() -> list[tuple[str, Mapping[str, object]]]:
    """Return {module: its names} of the process, and load none: some do when they are asked."""
    return [(name, getattr(m, "__dict__", {})) for name, m in list(sys.modules.items())]


def _file_of(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or ""


def _foreign(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in FOREIGN


def _binds(owner: type, attribute: str) -> bool:
    """Tell whether a class or one of its methods may bind an attribute, unparsed."""
    if _foreign(owner.__module__):
        return False
    held = vars(owner)
    noted = attribute in held or attribute in held.get("__annotations__", {})
    return noted or any(attribute in _asked(code) for code in _codes(held))


def _codes(held: object) -> Iterator[CodeType]:
    functions = (f for f in dict(held).values() if isinstance(f, FunctionType))  # type: ignore[call-overload]
    yield from (f.__code__ for f in functions)


def _asked(code: CodeType) -> tuple[object, ...]:
    return (*code.co_names, *code.co_consts)  # setattr(self, "scale", ...) holds it as a constant
