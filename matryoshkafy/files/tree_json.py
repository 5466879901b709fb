"""The structure of a model's inputs and outputs (a torch pytree spec) as JSON, and back."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from matryoshkafy.files.json_text import JsonError, is_list, is_object, shown
from matryoshkafy.files.values_json import MAX_DEPTH, Values, is_name
from matryoshkafy.graph.holders import named_tuple

PLACE = "the structure of the inputs or outputs"
# The modules that define output classes; importing no other keeps a file from choosing what runs.
OUTPUT_MODULES = re.compile(
    r"transformers\.(?:modeling_outputs|utils\.generic|models\.\w+\.modeling_\w+)", re.ASCII
)
FACTORIES = {"list": list, "dict": dict, "int": int, "float": float, "tuple": tuple, "none": None}


@dataclass(frozen=True)
class _Kind:
    """One type of container: the context that torch keeps for it, as JSON and back."""

    type: Any
    write: Callable[[Any], Any]
    read: Callable[[Any, int], Any]


def spec_to_json(spec: TreeSpec) -> Any:
    """Return the structure as JSON: null for a leaf, else an object with type, context, children.

    Output classes of transformers keep their name, other subclasses of them become plain
    dictionaries. Raises JsonError, with its name, for any other type.
    """
    if spec.is_leaf():
        return None
    name, context = _type_and_context(spec)
    children = [spec_to_json(child) for child in spec.children()]
    record = {"type": name, "context": context, "children": children}
    return {key: item for key, item in record.items() if item is not None}


def spec_from_json(saved: object) -> TreeSpec:
    """Return the structure that spec_to_json wrote.

    Named tuples come back as new classes of the same name and fields; output classes of
    transformers as themselves where it is installed, else as dictionaries. Raises JsonError.
    """
    return _read(saved, 0)


def _type_and_context(spec: TreeSpec) -> tuple[str, Any]:
    for name, kind in KINDS.items():
        if spec.type is kind.type:
            return name, kind.write(spec.context)
    if pytree.is_structseq_class(spec.type):
        return "return_type", spec.type.__name__
    if _is_model_output(spec.type):
        return _output_to_json(spec.type, spec.context)
    raise JsonError(
        f"{PLACE} holds a {spec.type.__module__}.{spec.type.__qualname__}, which cannot be saved. "
        f"Let the model take and return tensors in tuples, lists or dictionaries (a transformers "
        f"model: use_cache=False)."
    )


def _output_to_json(output: type, keys: Iterable[object]) -> tuple[str, Any]:
    listed = _write_keys(keys)
    if not OUTPUT_MODULES.fullmatch(output.__module__):
        return "dict", listed
    return "model_output", {"module": output.__module__, "name": output.__name__, "keys": listed}


def _is_model_output(kind: object) -> bool:
    base = _model_output_base()
    return base is not None and isinstance(kind, type) and issubclass(kind, base)


@lru_cache
def _model_output_base() -> type | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    return importlib.import_module("transformers.utils.generic").ModelOutput


def _read(saved: object, depth: int) -> TreeSpec:
    if saved is None:
        return pytree.treespec_leaf()
    if depth > MAX_DEPTH:
        raise JsonError(f"{PLACE} is nested more than {MAX_DEPTH} deep; the file is damaged.")
    if not is_object(saved) or not is_list(saved.get("children")):
        raise JsonError(f"{PLACE} has the part {shown(saved)}, which is none; the file is damaged.")
    children = [_read(child, depth + 1) for child in saved["children"]]
    name, context = str(saved.get("type")), saved.get("context")
    if name in CLASSES:
        return CLASSES[name](context, children)
    if name not in KINDS:
        raise JsonError(f"{PLACE} has the type {shown(name)}; known are {', '.join(KINDS)}.")
    kind = KINDS[name]
    try:
        found = kind.read(context, len(children))
    except (TypeError, ValueError, KeyError):
        raise JsonError(f"{PLACE} has a {name} of {shown(context)}; it is damaged.") from None
    return TreeSpec(kind.type, found, children)


def _output_from_json(context: Any, children: list[TreeSpec]) -> TreeSpec:
    try:
        module, name = context["module"], context["name"]
        keys = _read_keys(context["keys"], len(children))
        if not OUTPUT_MODULES.fullmatch(module) or not is_name(name):
            raise ValueError(context)
    except (TypeError, KeyError, ValueError):
        raise JsonError(f"{PLACE} has the output class {shown(context)}: not allowed.") from None
    return TreeSpec(_output_class(module, name) or dict, keys, children)


def _output_class(module: str, name: str) -> type | None:
    if _model_output_base() is None:
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    registered = _is_model_output(found) and found in pytree.SUPPORTED_NODES
    return found if registered else None


def _write_keys(keys: Iterable[object]) -> list[object]:
    return [Values(PLACE, {}).write(key) for key in keys]


def _read_keys(saved: Iterable[object], count: int) -> list[object]:
    keys = [Values(PLACE, {}).read(key) for key in saved]
    if len(keys) != count or len(set(keys)) != count:
        raise ValueError(saved)
    return keys


def _no_context(context: object, count: int) -> None:
    if context is not None:
        raise ValueError(context)


def _read_namedtuple(saved: Any, count: int) -> type:
    name, fields = saved["name"], tuple(saved["fields"])
    if not all(map(is_name, (name, *fields))) or len(fields) != count:
        raise ValueError(saved)
    return named_tuple(name, fields)


def _write_defaultdict(context: Any) -> dict[str, object]:
    factory, keys = context
    names = [name for name, known in FACTORIES.items() if known is factory]
    if not names:
        raise JsonError(f"{PLACE} holds a defaultdict of {factory!r}; use a plain dictionary.")
    return {"factory": names[0], "keys": _write_keys(keys)}


def _read_maxlen(saved: object, count: int) -> int | None:
    if saved is None or (type(saved) is int and saved >= count):
        return saved
    raise ValueError(saved)


def _return_type_from_json(name: object, children: list[TreeSpec]) -> TreeSpec:
    found = getattr(torch.return_types, name, None) if is_name(name) else None
    if not isinstance(found, type) or not pytree.is_structseq_class(found):
        raise JsonError(f"{PLACE} has the type torch.return_types.{shown(name)}, which is none.")
    if getattr(found, "n_sequence_fields", None) != len(children):
        raise JsonError(f"{PLACE} has {len(children)} parts for the {name} of torch: damaged.")
    return TreeSpec(found, None, children)


KINDS = {
    "tuple": _Kind(tuple, lambda _: None, _no_context),
    "list": _Kind(list, lambda _: None, _no_context),
    "dict": _Kind(dict, _write_keys, _read_keys),
    "OrderedDict": _Kind(OrderedDict, _write_keys, _read_keys),
    "defaultdict": _Kind(
        defaultdict,
        _write_defaultdict,
        lambda saved, n: [FACTORIES[saved["factory"]], _read_keys(saved["keys"], n)],
    ),
    "deque": _Kind(deque, lambda maxlen: maxlen, _read_maxlen),
    "namedtuple": _Kind(
        namedtuple,
        lambda kind: {"name": kind.__name__, "fields": list(kind._fields)},
        _read_namedtuple,
    ),
}
# Here the file chooses the class itself, out of the modules that the reader allows.
CLASSES = {"model_output": _output_from_json, "return_type": _return_type_from_json}
