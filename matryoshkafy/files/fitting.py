"""Whether plan, graph, call and weights of a checkpoint speak of one model, before one is made.

Every size that a file states is compared with what follows from the graph on fake tensors, which
hold no memory, so that a small file can neither ask for a large one's memory nor hang the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from matryoshkafy.axes import dims
from matryoshkafy.files.json_text import shown
from matryoshkafy.files.records import CheckpointError
from matryoshkafy.graph.nodes import (
    Info,
    TensorInfo,
    info_of,
    outputs_of,
    reached,
    sources_of,
)
from matryoshkafy.graph.signature import Signature
from matryoshkafy.plan.plan import Plan, Shape
from matryoshkafy.plan.stored import baked_name

# What depends on values, or has no implementation for fake tensors, is unknown, and so is what
# follows from it.
UNKNOWN = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,
)
MAX_LEVELS = 1024
MAX_ELEMENTS = 2**38
MAX_WIDTH = 2**24
MAX_INPUT = 2**27
# Pieces into which a cut of all axes falls: the memory that their indices take.
MAX_PIECES = 2**20
# A statistic of parameters is about as large as they are.
STATISTIC_SHARE, STATISTIC_LEAST = 16, 2**16
RANDOM = torch.Tag.nondeterministic_seeded


def check_call(graph: fx.Graph, signature: Signature, folder: Path) -> None:
    """Raise CheckpointError unless the graph has the inputs and outputs of its call."""
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    outputs = outputs_of(graph)
    expected = sum(sum(item.is_tensor) for item in signature.inputs)
    if inputs != expected:
        raise CheckpointError(f"{folder}: the graph has {inputs} inputs, its call {expected}.")
    if len(outputs) != signature.out_spec.num_leaves:
        raise CheckpointError(f"{folder}: the graph's outputs do not fit its call's: damaged.")


def check_reads(graph: fx.Graph, names: set[str], folder: Path, kind: str) -> None:
    """Raise CheckpointError where the graph reads what was not saved; a sub-model may need less."""
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for target in targets - names - {"training"}:
        reserved = any(hasattr(nn.Module, part) for part in target.split("."))
        if kind == "doll" or reserved:
            raise CheckpointError(
                f"{folder}: the graph reads {shown(target)}, which was not saved. The files are of "
                "different models, or damaged: save the model again."
            )


def check_fit(plan: Plan, graph: fx.Graph, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError unless plan, graph and weights agree on the size of everything.

    tensors: what the files hold, on the meta device.
    """
    _check_plan(plan, folder)
    _check_names(plan, graph, folder)
    _check_parameters(plan, tensors, folder)
    _check_targets(plan, graph, tensors, folder)
    _check_stored(plan, folder)
    infos = {node.name: info_of(node) for node in graph.nodes}
    for name, planned in plan.nodes.items():
        info = infos.get(name)
        if plan.masked:
            info = _spread(info, plan.dims(name))
        _check_node(name, planned, info, folder)
    _check_inputs(graph, folder)
    _check_graph(graph, folder)
    _check_statistics(plan, graph, tensors, folder)


def _check_plan(plan: Plan, folder: Path) -> None:
    if not all(map(_sound, (*_leaves(plan),))):
        raise CheckpointError(
            f"{folder}: the plan holds a value of another kind than it should. The file is "
            "damaged: save the model again."
        )
    if plan.levels > MAX_LEVELS:
        raise CheckpointError(f"{folder}: the plan has {plan.levels} sizes, at most {MAX_LEVELS}.")
    if not 1 <= plan.unit <= plan.width <= MAX_WIDTH or plan.sizes[-1] > plan.width:
        raise CheckpointError(f"{folder}: the plan has size {plan.sizes[-1]} of {plan.width}.")
    sizes = {i: group.size for i, group in enumerate(plan.groups)}
    used = set(_dims(plan))
    for factor in (factor for dim in used for factor in _factors(dim)):
        if sizes.get(factor.group) != factor.size:
            raise CheckpointError(
                f"{folder}: the plan has an axis of {factor.size} units in group {factor.group}, "
                f"which has {sizes.get(factor.group)}. The plan is damaged: save the model again."
            )
    pieces = sum(min(pieces_of(dim), MAX_PIECES + 1) for dim in used) * plan.levels
    if pieces > MAX_PIECES or any(dims.size(dim) > MAX_ELEMENTS for dim in used):
        raise CheckpointError(
            f"{folder}: the plan cuts its axes into more pieces than any model has. The plan is "
            "damaged: save the model again."
        )


def _sound(leaf: object) -> bool:
    if isinstance(leaf, float):
        return math.isfinite(leaf)
    return isinstance(leaf, (int, str, bool)) or leaf is None


def _leaves(value: Any) -> Iterator[object]:
    if is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (tuple, list, frozenset)):
        for item in cast("Iterable[object]", value):
            yield from _leaves(item)
    else:
        yield value


def _dims(plan: Plan) -> Iterator[dims.Dim]:
    """Every dim of a plan: the tuples that hold factors."""
    tables = [*plan.parameters.values(), *(s for outs in plan.nodes.values() for s in outs)]
    tables += [tuple(notes.values()) for notes in plan.notes.values()]
    for table in tables:
        yield from table


def _factors(dim: dims.Dim) -> Iterator[dims.Nested]:
    for factor in dim:
        if isinstance(factor, dims.Nested):
            yield factor
        elif isinstance(factor, dims.Sum):
            for part in factor.segments:
                yield from _factors(part)


def pieces_of(dim: dims.Dim) -> int:
    """Return an upper bound of the segments into which a cut of a dim may fall."""
    pieces, inner = 1, False
    for factor in reversed(dim):
        own = 1
        if isinstance(factor, dims.Sum):
            own = sum(map(pieces_of, factor.segments))
        if inner:
            own = dims.size((factor,))
        pieces *= max(own, 1)
        inner = inner or dims.is_nested((factor,))
    return pieces


def _check_names(plan: Plan, graph: fx.Graph, folder: Path) -> None:
    """Refuse a plan that speaks of nodes that the graph has not."""
    nodes = {node.name for node in graph.nodes}
    spoken: Mapping[str, Iterable[str]] = {
        "nodes": plan.nodes,
        "actions": plan.actions,
        "scalars": (scalar.node for scalar in plan.scalars),
        "tail": plan.tail,
        "masks": (name for node, masks in plan.masks.items() for name in (node, *masks)),
        # With scope="output" they are of outputs, by number.
        "notes": plan.notes if plan.nodes else (),
    }
    for part, names in spoken.items():
        missing = sorted(set(names) - nodes)
        if missing:
            raise CheckpointError(
                f"{folder}: the plan has {shown(missing[0])} among its {part}, and the graph has "
                "no such node. They belong to different models: save the model again."
            )


def _check_targets(
    plan: Plan, graph: fx.Graph, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """Refuse a node that reads another tensor than the one that it was traced with."""
    for node in graph.find_nodes(op="get_attr"):
        name, info = str(node.target), info_of(node)
        axes, planned = plan.parameters.get(name), plan.outputs(node.name)
        if axes is not None and planned and planned[0] != axes:
            raise CheckpointError(
                f"{folder}: the graph reads {name} at {node.name}, where the plan expects a tensor "
                "with other axes. The graph belongs to another model: save the model again."
            )
        # A sub-model's tensors are cut; its graph states what they were.
        held = tuple(tensors[name].shape) if name in tensors else None
        whole = held if axes is None else tuple(map(dims.size, axes))
        if whole is not None and isinstance(info, TensorInfo) and not _agree(whole, info.shape):
            raise CheckpointError(
                f"{folder}: the graph reads {name} at {node.name} with the shape {info.shape}, but "
                f"the file holds {held or whole}. They belong to different models: save the model "
                "again."
            )


def _check_parameters(plan: Plan, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a plan about other shapes: it would slice out of bounds."""
    full = plan.ladder[-1]
    for name, axes in plan.parameters.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        planned = tuple(dims.size_at(dim, full) for dim in axes)
        if shape is not None and shape != planned:
            raise CheckpointError(
                f"{folder}: the plan expects {name} of shape {planned}, the file holds "
                f"{shape}. The plan belongs to another model: save the model again."
            )


def _check_stored(plan: Plan, folder: Path) -> None:
    """What sub-models store are tensors of the plan, or the statistics that it takes."""
    for name, kept in plan.stored.items():
        known = plan.parameters.get(name)
        if kept.source:
            own = kept.source in plan.full and name == baked_name(kept.source)
            known = plan.dims(kept.source) if own else None
        if known != kept.dims:
            raise CheckpointError(
                f"{folder}: the plan stores {shown(name)} with other axes than it has. The plan is "
                "damaged: save the model again."
            )


def _check_node(name: str, planned: tuple[Shape, ...], info: Info, folder: Path) -> None:
    infos = info if isinstance(info, tuple) else (info,)
    for shape, each in zip(planned, infos, strict=False):
        sizes = tuple(map(dims.size, shape))
        known = each.shape if isinstance(each, TensorInfo) else None
        if known is not None and not _agree(sizes, known):
            raise CheckpointError(
                f"{folder}: the plan gives {name} the shape {sizes}, the graph {known}. They "
                "belong to different models: save the model again."
            )


def _spread(info: Info, planned: Shape) -> Info:
    """Return what the graph knows of a node, a number for all units taken as one at every unit.

    That is what masked nesting makes of a statistic over a nested axis, and of what follows it.
    """
    if not isinstance(info, TensorInfo) or len(info.shape) != len(planned):
        return info
    pairs = zip(planned, info.shape, strict=True)
    sizes = (dims.size(d) if n == 1 and dims.is_nested(d) else n for d, n in pairs)
    return replace(info, shape=tuple(sizes))


def _agree(planned: tuple[int, ...], known: tuple[int, ...]) -> bool:
    """-1 stands for what only the data decides; a plan of no dims says nothing."""
    return not planned or (
        len(planned) == len(known)
        and all(-1 in (a, b) or a == b for a, b in zip(planned, known, strict=True))
    )


def _check_inputs(graph: fx.Graph, folder: Path) -> None:
    for node in graph.nodes:
        info = info_of(node)
        most = MAX_INPUT if node.op == "placeholder" else MAX_ELEMENTS
        if any(math.prod(each.shape) > most for each in _tensors(info)):
            raise CheckpointError(
                f"{folder}: {node.name} has the shape {shown(info)}, which is larger than any "
                "model's. The file is damaged: save the model again."
            )


def _tensors(info: Info) -> Iterator[TensorInfo]:
    if isinstance(info, TensorInfo):
        yield info
    elif isinstance(info, tuple):
        for item in info:
            yield from _tensors(item)


def _check_graph(graph: fx.Graph, folder: Path) -> None:
    values: dict[fx.Node, object] = {}
    known: dict[str, object] = {}
    with FakeTensorMode(), torch.no_grad():
        for node in graph.nodes:
            if node.op == "output" or not all(n in values for n in node.all_input_nodes):
                continue
            try:
                values[node] = _fake(node, values, known)
            except UNKNOWN:
                continue
            except Exception as error:
                raise CheckpointError(
                    f"{folder}: the graph cannot be computed at {node.name}, {node.target}: "
                    f"{str(error).strip()[:200]}. The file is damaged: save the model again."
                ) from error
            found, stated = info_of(values[node]), info_of(node)
            if node.op == "call_function" and not _same(found, stated):
                raise CheckpointError(
                    f"{folder}: the graph says that {node.name} is {shown(stated)}, but "
                    f"{node.target} makes {shown(found)}. The file is damaged: save the model "
                    "again."
                )


def _fake(node: fx.Node, values: Mapping[fx.Node, object], known: dict[str, object]) -> object:
    """Layers repeat: what a call of these shapes gives is found out once."""
    if node.target == "training":
        return False
    if node.op == "call_function":
        look_up = cast("Callable[[fx.Node], Any]", values.__getitem__)
        args, kwargs = cast("tuple[Any, Any]", fx.map_arg((node.args, node.kwargs), look_up))
        key = f"{node.target}{_described((args, kwargs))}"
        if key not in known:
            known[key] = _called(node, args, kwargs)
        return known[key]
    info = info_of(node)
    if not isinstance(info, TensorInfo) or -1 in info.shape:
        raise NotImplementedError(f"{node.name} has a shape that only the data decides")
    return torch.empty(info.shape, dtype=info.dtype)


def _called(node: fx.Node, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    try:
        return cast("Callable[..., object]", node.target)(*args, **kwargs)
    except RuntimeError as error:
        # Operators of other libraries may have no implementation for fake tensors.
        if getattr(node.target, "namespace", "aten") == "aten":
            raise
        raise NotImplementedError(str(node.target)) from error


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{value.stride()}{value.dtype}"
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return f"{{{','.join(f'{k}:{_described(v)}' for k, v in items)}}}"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_described, cast('Sequence[object]', value)))}]"
    return repr(value)


def _same(found: Info, stated: Info) -> bool:
    """Nodes whose size was not saved, or that only the data decides, are not compared."""
    if isinstance(found, TensorInfo) and isinstance(stated, TensorInfo):
        return _agree(found.shape, stated.shape) or (not found.shape and not stated.shape)
    if isinstance(found, tuple) and isinstance(stated, tuple):
        return len(found) == len(stated) and all(map(_same, found, stated))
    return not isinstance(found, TensorInfo) or stated is None


def _check_statistics(
    plan: Plan, graph: fx.Graph, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """What slicing computes out of parameters alone stays as small as they are, and as sure."""
    taken = [node for node in graph.nodes if node.name in plan.full]
    single = all(n.op == "call_function" and isinstance(info_of(n), TensorInfo) for n in taken)
    if len(taken) != len(plan.full) or not single:
        raise CheckpointError(f"{folder}: the plan takes statistics of nodes that give none.")
    needed = reached(taken, sources_of)
    read = sum(math.prod(i.shape) for n in needed if n.op == "get_attr" for i in _of(n))
    most = STATISTIC_SHARE * read + STATISTIC_LEAST
    for node in needed:
        large = any(math.prod(info.shape) > most for info in _of(node))
        if node.op == "placeholder" or large or RANDOM in getattr(node.target, "tags", ()):
            raise CheckpointError(
                f"{folder}: the plan takes {node.name} for a statistic of the weights alone, which "
                "it is not. The plan is damaged: save the model again."
            )


def _of(node: fx.Node) -> Iterator[TensorInfo]:
    yield from _tensors(info_of(node))
