"""A torch.fx graph as plain JSON, and back.

A graph out of a file is a program. Only operators of known libraries and a closed table of Python
functions come back, no name can smuggle code into what torch.fx generates, and nothing is imported
by a name that the file chose.
"""

from __future__ import annotations

import builtins
import importlib.util
import keyword
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from matryoshkafy.files.json_text import JsonError, is_list, is_object, shown
from matryoshkafy.files.operators import NAMESPACES, why_not
from matryoshkafy.files.tree_json import spec_from_json as spec_from_json
from matryoshkafy.files.tree_json import spec_to_json as spec_to_json
from matryoshkafy.files.values_json import (
    MAX_DEPTH,
    MAX_TEXT,
    Values,
    is_name,
    torch_constant,
    write_constant,
)
from matryoshkafy.graph.nodes import Info, TensorInfo, info_of, source_of

FORMAT = 1
# The largest graph of the zoo has 6,000 nodes; the code of 60,000 takes 20 s to compile.
MAX_NODES = 60_000
OPS = ("placeholder", "get_attr", "call_function", "output")
ATTRIBUTES = ("device", "dtype", "max", "min", "training")
# Parts of a parameter's path: digits (nn.Sequential) and the free keys of nn.ModuleDict, but no
# quote, backslash or line break, because torch.fx writes them into source code.
PART = r"[A-Za-z0-9_][\w\-:/+@ ]*"
PATH = re.compile(rf"{PART}(?:\.{PART})*")
OPERATOR = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)


def _functions() -> dict[str, Callable[..., object]]:
    modules = {
        operator: "add sub mul floordiv truediv mod pow neg pos abs eq ne lt le gt ge and_ or_ "
        "not_ xor invert lshift rshift getitem is_ is_not contains index",
        math: "floor ceil sqrt trunc log log2 log10 exp pow cos sin tan cosh sinh tanh acos asin "
        "atan",
        builtins: "getattr abs bool float int len max min round sum",
        torch: "finfo promote_types sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt "
        "sym_sum _sym_acos _sym_asin _sym_atan _sym_cos _sym_cosh _sym_log2 _sym_sin _sym_sinh "
        "_sym_sqrt _sym_tan _sym_tanh",
    }
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module, names in modules.items()
        for name in names.split()
        if hasattr(module, name)
    }


FUNCTIONS: Mapping[str, Callable[..., object]] = MappingProxyType(_functions())


@dataclass(frozen=True)
class Callables:
    """What a saved graph may call: namespaces of torch.ops, and Python functions by name."""

    namespaces: tuple[str, ...]
    functions: Mapping[str, Callable[..., object]]


def callables(
    namespaces: Collection[str] = (), functions: Mapping[str, Callable[..., object]] | None = None
) -> Callables:
    """Return the default callables and the caller's own: namespaces of torch.ops, functions."""
    return Callables((*NAMESPACES, *namespaces), {**FUNCTIONS, **(functions or {})})


def graph_to_json(graph: Graph, allowed: Callables | None = None) -> dict[str, object]:
    """Return a flat torch.fx graph as JSON values, from which graph_from_json builds it again.

    Kept: order, names, targets, arguments, `meta["source"]` (or the user's frame of the stack
    trace) and `meta["info"]` (or that of `meta["val"]`). Not kept: type annotations, the rest of
    meta, the code generator (save its specs with spec_to_json). Raises JsonError, with node and
    remedy, for what cannot be saved.
    """
    allowed = allowed or callables()
    nodes = [_write_node(node, allowed) for node in graph.nodes]
    saved: dict[str, object] = {"format": FORMAT, "nodes": nodes}
    # What would be refused at load is refused now, while the user still has the model.
    graph_from_json(saved, allowed)
    return saved


def graph_from_json(saved: object, allowed: Callables | None = None) -> Graph:
    """Return the graph that graph_to_json wrote; each node has `meta["info"]`, `meta["source"]`.

    Raises JsonError for a target that is not allowed and for JSON that is no graph.
    """
    allowed = allowed or callables()
    graph = Graph()
    nodes: dict[str, Node] = {}
    for record in _records(saved):
        node = _read_node(graph, record, nodes, allowed)
        nodes[node.name] = node
    ops = [node.op for node in graph.nodes]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise JsonError("the saved graph has no single output at its end; the file is damaged.")
    return graph


def _write_node(node: Node, allowed: Callables) -> dict[str, object]:
    source = source_of(node)
    place = f"node {node.name!r} ({source})" if source else f"node {node.name!r}"
    values = Values(place, {})
    info = info_of(node)
    needed = {
        "name": node.name,
        "op": node.op,
        "target": _write_target(node, allowed, place),
        "args": [values.write(arg) for arg in node.args],
    }
    optional = {
        "kwargs": {key: values.write(arg) for key, arg in node.kwargs.items()},
        "shape": _write_info(info),
        "source": source,
    }
    return {**needed, **{key: item for key, item in optional.items() if item not in (None, {})}}


def _write_target(node: Node, allowed: Callables, place: str) -> str:
    if node.op not in OPS:
        raise JsonError(
            f"{place} is a {node.op} of {node.target!r}; only {', '.join(OPS)} can be saved. "
            f"Trace the model with torch.export, which flattens modules and methods."
        )
    target: object = node.target
    if node.op != "call_function" or isinstance(node.target, OpOverload):
        return str(target)
    names = [name for name, known in allowed.functions.items() if known is node.target]
    if names:
        return names[0]
    raise JsonError(
        f"{place} calls {_qualified(node.target)}, which cannot be saved: only operators of "
        f"torch.ops and scalar functions such as operator.add can. Inline it, or register it with "
        f"torch.library.custom_op and allow its namespace."
    )


def _qualified(target: object) -> str:
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    module = getattr(target, "__module__", None)
    return f"{module}.{name}" if name and module else shown(target)


def _records(saved: object) -> list[object]:
    if not is_object(saved) or not is_list(saved.get("nodes")):
        raise JsonError("the saved graph is no JSON object with a list of nodes; it is damaged.")
    if saved.get("format") != FORMAT:
        raise JsonError(
            f"the saved graph has format {shown(saved.get('format'))}, this version of "
            f"matryoshkafy reads format {FORMAT}. Upgrade matryoshkafy, or save the model again."
        )
    if not 0 < len(saved["nodes"]) <= MAX_NODES:
        raise JsonError(
            f"the saved graph has {len(saved['nodes'])} nodes, expected 1 to {MAX_NODES}."
        )
    return saved["nodes"]


def _read_node(graph: Graph, record: object, nodes: Mapping[str, Node], allowed: Callables) -> Node:
    if not is_object(record):
        raise JsonError(f"the saved graph has the node {shown(record)}, no JSON object: damaged.")
    name, place = record.get("name"), f"node {shown(record.get('name'))} of the saved graph"
    if not is_name(name) or name in nodes:
        raise JsonError(f"{place}: its name is taken or no identifier; the file is damaged.")
    args, kwargs = _read_arguments(record, Values(place, nodes), place)
    target = _read_target(record, allowed, place)
    if target is getattr and (kwargs or len(args) != 2 or args[1] not in ATTRIBUTES):
        raise JsonError(f"{place} reads an attribute that is none of {', '.join(ATTRIBUTES)}.")
    node = graph.create_node(record["op"], target, args, kwargs, name)
    # create_node renames what shadows a builtin ("input"); torch.export keeps such names.
    node.name = str(name)
    node.meta |= _read_meta(record, place)
    return node


def _read_arguments(
    record: Mapping[str, object], values: Values, place: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = record.get("args"), record.get("kwargs", {})
    if not is_list(args) or not is_object(kwargs):
        raise JsonError(f"{place} has no list of arguments; the file is damaged.")
    illegal = [key for key in kwargs if not is_name(key)]
    if illegal:
        raise JsonError(f"{place} has the argument {shown(illegal[0])}, which is no identifier.")
    return tuple(map(values.read, args)), {k: values.read(v) for k, v in kwargs.items()}


def _read_target(record: Mapping[str, object], allowed: Callables, place: str) -> Any:
    op, target = record.get("op"), record.get("target")
    if op not in OPS:
        raise JsonError(f"{place} has the op {shown(op)}, which is none of {', '.join(OPS)}.")
    if not isinstance(target, str) or len(target) > MAX_TEXT:
        raise JsonError(f"{place} has the target {shown(target)}, expected a text.")
    if op == "call_function":
        return _read_function(target, allowed, place)
    legal = _is_parameter(target) if op == "placeholder" else is_path(target)
    if not legal:
        raise JsonError(f"{place} has the target {shown(target)}, which is no legal name.")
    return target


def _is_parameter(target: str) -> bool:
    bare = target.removeprefix("*").removeprefix("*")
    return bare.isidentifier() and not keyword.iskeyword(bare)


def is_path(target: str) -> bool:
    """Tell whether a tensor's dotted name is safe in the source code that torch.fx writes."""
    hidden = any(part[:2] == part[-2:] == "__" for part in target.split("."))
    return PATH.fullmatch(target) is not None and not hidden


def _read_function(target: str, allowed: Callables, place: str) -> Callable[..., object]:
    if target in allowed.functions:
        return allowed.functions[target]
    namespace = target.partition(".")[0]
    if not OPERATOR.fullmatch(target) or namespace not in allowed.namespaces:
        raise JsonError(
            f"{place} calls {shown(target)}, which a saved graph may not call. Allowed are scalar "
            f"functions of Python and operators of {', '.join(allowed.namespaces)}. If you trust "
            f"the file, allow the namespace {shown(namespace)} too."
        )
    found = _operator(target)
    if found is None:
        raise JsonError(
            f"{place} calls {shown(target)}, which torch {torch.__version__} does not know. Import "
            f"the library that registers it, or use the torch version that saved the file."
        )
    reason = why_not(found, allowed.namespaces)
    if reason:
        raise JsonError(f"{place} calls {shown(target)}, which {reason}: a saved graph may not.")
    return found


def _operator(target: str) -> OpOverload[..., Any] | None:
    namespace, packet, overload = target.split(".")
    if namespace == "torchvision" and importlib.util.find_spec(namespace):
        importlib.import_module("torchvision")
    found: Any = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    known = isinstance(found, OpOverload) and str(cast("object", found)) == target
    return cast("OpOverload[..., Any]", found) if known else None


def _write_info(info: Info) -> object:
    if isinstance(info, TensorInfo):
        return {"dtype": write_constant(info.dtype), "shape": list(info.shape)}
    if isinstance(info, tuple):
        return [_write_info(item) for item in info]
    return Values("a shape", {}).write(info)


def _read_meta(record: Mapping[str, object], place: str) -> dict[str, object]:
    meta: dict[str, object] = {"info": _read_info(record.get("shape"), place, 0)}
    source = record.get("source")
    if source is None:
        return meta
    if not isinstance(source, str) or len(source) > MAX_TEXT or not source.isprintable():
        raise JsonError(f"{place} has the source {shown(source)}, expected one line of text.")
    return {**meta, "source": source}


def _read_info(item: object, place: str, depth: int) -> Info:
    if depth > MAX_DEPTH:
        raise JsonError(f"{place} nests its shapes more than {MAX_DEPTH} deep.")
    if is_list(item):
        return tuple(_read_info(each, place, depth + 1) for each in item)
    if not is_object(item) or "shape" not in item:
        return Values(f"the shape of {place}", {}).read(item)
    try:
        dtype = torch_constant(torch.dtype)(item.get("dtype"), shown)
    except ValueError:
        dtype = None
    shape = item["shape"]
    sound = is_list(shape) and all(type(n) is int and -1 <= n < 2**63 for n in shape)
    if dtype is None or not sound:
        raise JsonError(f"{place} has the shape {shown(item)}, which is no tensor's.")
    return TensorInfo(tuple(shape), dtype)
