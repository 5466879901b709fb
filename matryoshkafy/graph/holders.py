"""Inputs that are objects (a dataclass, a batch of a class of one's own), taken apart and rebuilt.

The inputs of a graph are tensors. An object that holds some reaches it as a named tuple of the name
of its class, with the attributes that the forward reads; the user's forward gets the object back.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.copies import NO_OBJECT, copied_tensor

Reads = Mapping[type, set[str]]
DEPTH = 4  # of objects within objects
# Whoever asks for these may read every attribute.
WHOLE = frozenset(("__dict__", "__getstate__", "__reduce_ex__", "__copy__", "__deepcopy__"))
# A field of a named tuple begins with no underscore.
PRIVATE = "attribute"
# Stands for an attribute that the forward asks for and does not find.
ABSENT, MISSING = (), pytree.tree_structure(())


@lru_cache(maxsize=256)
def named_tuple(name: str, fields: tuple[str, ...]) -> type:
    """Return the class of these fields, the same one each time."""
    return namedtuple(name, fields)  # pyright: ignore[reportUntypedNamedTuple]  inputs name them


def holds(value: object, depth: int = DEPTH) -> bool:
    """Tell whether a leaf is an object with tensors among its attributes, or a mapping of a class
    of its own with some.
    """
    if isinstance(value, NO_OBJECT) or is_array(value) or not depth:
        return False
    leaves = pytree.tree_leaves(list(_parts_of(value).values()))
    return any(
        isinstance(leaf, torch.Tensor) or is_array(leaf) or holds(leaf, depth - 1)
        for leaf in leaves
    )


def is_array(value: object) -> bool:
    """Tell whether a value is an array of numpy, which torch takes as a tensor."""
    return type(value).__module__ == "numpy" and hasattr(value, "__array_interface__")


def _parts_of(value: Any) -> dict[str, object]:
    """Return the attributes of an object by name, or what a mapping holds."""
    if isinstance(value, dict):
        return dict(cast("dict[str, object]", value))
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    own: dict[str, object] = getattr(value, "__dict__", {})
    held = {n: getattr(value, n) for n in slots if hasattr(value, n)} | own
    return {n: part for n, part in held.items() if not _is_cached(type(value), n)}


def _is_cached(kind: Any, name: str) -> bool:
    """Tell whether an attribute is computed of the others, and kept at the first call."""
    return isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)


def _slots(kind: type) -> tuple[str, ...]:
    named = kind.__dict__.get("__slots__", ())
    listed = (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for name in listed if not name.startswith("__"))


def refuse_opaque(names: Collection[str]) -> None:
    """Refuse a forward that returns objects of classes of these names."""
    if names:
        raise TraceError(
            f"the forward returns {', '.join(sorted(names))}, whose tensors a graph does not see. "
            "Expected tensors in tuples, lists, dictionaries or named tuples; register a dataclass "
            "once (torch.export.register_dataclass), then convert again."
        )


def reads_of(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Reads:
    """Return which attributes of the objects among its inputs a forward reads, by their class.

    Args:
        model: a spare, which is called in both modes.
        args: positional inputs.
        kwargs: inputs by name.

    Raises:
        TraceError: the forward sets attributes of an input, which a doll would not.
    """
    seen: dict[type, set[str]] = {}
    for training in (False, True):
        whole: list[tuple[object, type, dict[str, object]]] = []
        given, named = cast("tuple[Any, Any]", _watched((args, dict(kwargs)), seen, whole))
        try:
            with torch.no_grad():
                model.train(training)(*given, **named)
        except Exception:  # noqa: BLE001  the trace says what fails, and where
            continue
        for value, kind, before in whole:
            if type(value) is not kind:  # what is looked at below is not the forward's
                object.__setattr__(value, "__class__", kind)
            _refuse_written(_parts_of(value), before)
    return seen


def _watched(value: object, seen: dict[type, set[str]], whole: list[Any]) -> object:
    """Return copies of inputs whose objects note which of their attributes are read."""

    def own(leaf: object) -> object:
        if holds(leaf):
            return _watched_object(leaf, seen, whole)
        return copied_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(own, value)


def _watched_object(value: object, seen: dict[type, set[str]], whole: list[Any]) -> object:
    kind, names = type(value), seen.setdefault(type(value), set())
    parts = {n: _watched(part, seen, whole) for n, part in _parts_of(value).items()}
    made = _made(kind, parts)
    whole.append((made, kind, _parts_of(made)))
    if issubclass(kind, dict):  # whose keys are all taken
        return made
    try:
        object.__setattr__(made, "__class__", _noting(kind, names))
    except Exception:  # noqa: BLE001  a class may refuse to be derived from, in its own way
        names.update(parts)
    return made


def _noting(kind: Any, names: set[str]) -> type:
    def noted(self: object, name: str) -> object:
        names.add(name)
        return kind.__getattribute__(self, name)

    return cast("Any", type(kind))(
        kind.__name__, (kind,), {"__slots__": (), "__getattribute__": noted}
    )


def _refuse_written(after: Mapping[str, object], before: Mapping[str, object]) -> None:
    left, right = pytree.tree_leaves(before), pytree.tree_leaves(after)
    same = len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
    if not same or before.keys() != after.keys():
        changed = [n for n in after if after[n] is not before.get(n)] or list(after)
        raise TraceError(
            f"the forward sets {changed[0]!r} of an object among its inputs, which the doll would "
            "leave as it is. Let it work on a copy (batch = copy.copy(batch)), or give and return "
            "tensors; a cache of earlier steps is no input of a doll."
        )


def refuse_filled(inputs: Mapping[str, object]) -> None:
    """Refuse a forward that keeps tensors in an object among its inputs: a cache.

    Args:
        inputs: of a call, by name, after it; objects that held tensors before are taken apart.
    """
    for name, value in inputs.items():
        kept = next((leaf for leaf in pytree.tree_leaves(value) if holds(leaf)), None)
        if kept is not None:
            raise TraceError(
                f"the forward keeps tensors in its input {name!r} (a {type(kept).__name__}), which "
                "the doll would leave as it is; a cache of earlier steps is no input of a doll. "
                "Leave it out, or turn it off (use_cache=False)."
            )


def taken_apart(value: object, reads: Reads, kinds: dict[type, type]) -> object:
    """Return inputs with named tuples in place of their objects.

    Args:
        value: inputs in any structure.
        reads: which attributes are read, by class.
        kinds: is told which class stands behind which named tuple.
    """

    def apart(leaf: object) -> object:
        if not holds(leaf):
            return leaf
        kind, parts = type(leaf), _parts_of(leaf)
        names = _named(kind, parts, reads.get(kind, set()))
        found = _tuple_of(kind, names)
        kinds[found] = kind
        return found(*(taken_apart(parts.get(n, ABSENT), reads, kinds) for n in names))

    return pytree.tree_map(apart, value)


def _named(kind: Any, parts: Mapping[str, object], read: set[str]) -> tuple[str, ...]:
    """Return the attributes that stand for an object, also those that it lacks."""
    if issubclass(kind, dict):
        return tuple(parts)
    asked = (n for n in sorted(read - parts.keys()) if not hasattr(kind, n))
    lacking = [n for n in asked if not n.startswith("__")]
    return (*(n for n in parts if n in read or read & WHOLE), *lacking)


def _tuple_of(kind: type, names: tuple[str, ...]) -> type:
    try:
        fields = tuple(PRIVATE + n if n.startswith("_") else n for n in names)
        return named_tuple(kind.__name__, fields)
    except (TypeError, ValueError) as error:
        raise TraceError(
            f"an input is a {kind.__name__} that cannot be taken apart into tensors ({error}). "
            "Expected tensors, or tuples, lists, dictionaries or dataclasses of them."
        ) from error


def like(value: Any, spec: pytree.TreeSpec) -> Any:
    """Return an input of a later call with its objects taken apart as they were traced.

    Args:
        value: the input.
        spec: the structure of the traced input.

    Raises:
        TraceError: an object is of another class, or lacks an attribute.
    """
    if spec.is_leaf() or not _has_tuple(spec):
        return value
    if spec.type is namedtuple and holds(value):
        return _tuple_like(value, spec)
    parts, own = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if own.is_leaf() or len(parts) != len(spec.children()):
        return value
    return pytree.tree_unflatten(list(map(like, parts, spec.children())), own)


def _has_tuple(spec: pytree.TreeSpec) -> bool:
    return spec.type is namedtuple or any(map(_has_tuple, spec.children()))


def _tuple_like(value: object, spec: pytree.TreeSpec) -> object:
    parts, names = _parts_of(value), list(map(_attribute, spec.context._fields))
    kind, expected, had = type(value).__name__, spec.context.__name__, spec.children()
    traced = {n for n, child in zip(names, had, strict=True) if child != MISSING}
    closed = parts.keys() if isinstance(value, dict) else parts.keys() & set(names)
    if kind != expected or closed != traced:
        raise TraceError(
            f"an object of the class {kind} with {', '.join(sorted(parts))} was given; the model "
            f"was traced with a {expected} of which it reads {', '.join(sorted(traced))}. Give one "
            "like that, or convert again with inputs as you need them."
        )
    return spec.context(
        *(like(parts.get(n, ABSENT), child) for n, child in zip(names, had, strict=True))
    )


def _attribute(field: str) -> str:
    return field.removeprefix(PRIVATE) if field.startswith(PRIVATE + "_") else field


class Rebuilt:
    """A forward that gets its objects back from the named tuples that stand for them.

    Args:
        forward: the user's.
        kinds: {named tuple: class of the object}.
    """

    def __init__(self, forward: Callable[..., Any], kinds: Mapping[type, type]) -> None:
        self.forward, self.kinds = forward, kinds

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the user's forward."""
        return inspect.signature(self.forward)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        given, named = self._whole((args, kwargs))
        return self.forward(*given, **named)

    def _whole(self, value: Any) -> Any:
        return pytree.tree_map(self._object, value, is_leaf=lambda v: type(v) in self.kinds)

    def _object(self, leaf: Any) -> object:
        if type(leaf) not in self.kinds:
            return leaf
        pairs = zip(map(_attribute, leaf._fields), leaf, strict=True)
        parts = {name: self._whole(part) for name, part in pairs if not _is_absent(part)}
        return _made(self.kinds[type(leaf)], parts)


def _is_absent(part: object) -> bool:
    return isinstance(part, tuple) and not part


def _made(kind: Any, parts: Mapping[str, object]) -> object:
    """Return an object of a class with these attributes; a mapping with these keys."""
    try:
        if issubclass(kind, dict):
            return cast("Any", kind)(parts)
        made = kind.__new__(kind)
        for name, part in parts.items():
            object.__setattr__(made, name, part)
    except Exception as error:
        raise TraceError(
            f"an input is a {kind.__name__}, which cannot be made of its attributes ({error}). "
            "Expected tensors, or tuples, lists, dictionaries or dataclasses of them."
        ) from error
    return made
