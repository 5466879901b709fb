"""trace(): a user's model and example inputs become a torch.fx graph in one vocabulary of ops.

What holds of a `Trace`: the graph lints; every tensor of the model is a `get_attr` under the user's
own name; no node mutates its input; dropout and batch norm follow `self.training`; nothing is bound
to a device; every node carries `meta["shape"]` (concrete sizes) and `meta["source"]` (the user's line).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from matryoshkafy.cleaning import clean
from matryoshkafy.errors import TraceError
from matryoshkafy.graph_json import info_of, source_of

TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Input:
    """One argument of the user's forward: its structure, and per leaf a placeholder or a constant.

    `bounds` are the least and largest value of each example tensor (None: unknown, or no tensor).
    """

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    bounds: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True)
class Signature:
    """How the user's call becomes the flat inputs of the graph, and its flat outputs the result."""

    positional: tuple[str, ...]
    inputs: tuple[Input, ...]
    out_spec: pytree.TreeSpec

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the flat tensors of a call; raises `TraceError` when it is not the traced call."""
        given = dict(zip(self.positional, args, strict=False)) | dict(kwargs)
        if len(args) > len(self.positional):
            raise TraceError(
                f"{len(args)} positional arguments were given, the traced forward takes "
                f"{len(self.positional)}: {', '.join(self.positional)}"
            )
        flat: list[Any] = []
        for item in self.inputs:
            flat.extend(_leaves_of(item, given))
        known = {item.name for item in self.inputs}
        for name, value in given.items():
            if name not in known and value is not None:
                raise TraceError(
                    f"argument {name!r} was not part of the example inputs, so its path was not "
                    f"traced; convert again with {name!r} among the example inputs"
                )
        return flat

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Return the outputs in the structure of the user's model."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def _leaves_of(item: Input, given: Mapping[str, Any]) -> list[Any]:
    if item.name not in given:
        if any(item.is_tensor):
            raise TraceError(f"argument {item.name!r} is missing: the model was traced with it")
        return []
    leaves, spec = pytree.tree_flatten(given[item.name])
    if spec != item.spec:
        raise TraceError(
            f"argument {item.name!r} has structure {spec}, the model was traced with {item.spec}"
        )
    tensors = []
    for value, traced, is_tensor in zip(leaves, item.leaves, item.is_tensor, strict=True):
        if is_tensor:
            tensors.append(value)
        elif value != traced:
            raise TraceError(
                f"argument {item.name!r} is {value!r}, the model was traced with {traced!r}; "
                "convert again with the value you need"
            )
    return tensors


@dataclass(frozen=True)
class Trace:
    """A traced model: graph, call signature, and the state that the graph reads.

    `root` holds the user's own parameters and buffers under their own names; `notes` are remarks
    for the plan (static shapes, branches taken).
    """

    graph: fx.Graph
    signature: Signature
    root: nn.Module
    notes: tuple[str, ...] = ()
    hidden: frozenset[str] = frozenset()

    def state(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the root by name, ties included."""
        named = dict(self.root.named_parameters(remove_duplicate=False))
        return named | dict(self.root.named_buffers(remove_duplicate=False))

    def is_persistent(self, name: str) -> bool:
        """Tell whether the user's state_dict shows this tensor."""
        return name not in self.hidden


def trace(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Trace:
    """Trace the model on example inputs; the model is left as it was found.

    Raises `TraceError` that names the user's line where the model cannot be traced.
    """
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    with _prepared(model):
        program, notes = _export(model, args, kwargs)
    root = _root_of(model, program)
    graph = _unlifted(program, root)
    signature = _signature(model, args, kwargs, program)
    clean(graph, root)
    graph.lint()
    shown = set(root.state_dict(keep_vars=True))
    hidden = {n for n, _ in root.named_buffers(remove_duplicate=False) if n not in shown}
    return Trace(graph, signature, root, tuple(notes), frozenset(hidden))


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, plain attention kernels, experts as one batched product; then as before."""
    modes = {m: m.training for m in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    experts = list(_expert_configs(model))
    try:
        model.eval()
        for config, _ in experts:
            config._experts_implementation = "batched_mm"
        with torch.enable_grad():
            yield
    finally:
        for config, before in experts:
            config._experts_implementation = before
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in modes.items():
            module.training = mode


def _expert_configs(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """A loop over experts depends on the data; transformers offers the same sum as a product."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        before = getattr(config, "_experts_implementation", None)
        if isinstance(before, str) and id(config) not in seen:
            seen.add(id(config))
            yield config, before


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Export with dynamic batch and length, else dynamic batch, else with the example's sizes."""
    errors: list[BaseException] = []
    for dims, note in (((0, 1), None), ((0,), "only the batch size may differ from the example"),
                       ((), "traced with the example's sizes: other batch sizes need a new trace")):
        shapes = _dynamic_shapes(model, args, kwargs, dims) if dims else None
        try:
            return _quiet_export(model, args, kwargs, shapes), [note] if note else []
        except Exception as error:  # noqa: BLE001  torch.export raises errors of every kind
            errors.append(error)
    raise TraceError(_explain(errors[-1])) from errors[-1]


def _quiet_export(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> Any:
    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch prints the whole graph when an export fails: the error says what a person needs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            with contextlib.redirect_stdout(sink):
                yield
    finally:
        logging.disable(before)


def _explain(error: BaseException) -> str:
    text = str(error).strip().split("\n\n")[0].strip()[:600]
    where = _user_frame(error)
    place = f" at {where}" if where else ""
    return (
        f"the model could not be traced{place}: {type(error).__name__}: {text}\n"
        "Expected: a forward that runs on the example inputs without branching on tensor values. "
        "Rewrite that line with torch.where / torch.cond, or pass example inputs that avoid it."
    )


def _user_frame(error: BaseException) -> str | None:
    frame = None
    trace_ = error.__traceback__
    while trace_ is not None:
        code = trace_.tb_frame.f_code
        if not code.co_filename.startswith((TORCH_FOLDER, __file__, "<")):
            frame = f"{code.co_filename}:{trace_.tb_lineno} ({code.co_name})"
        trace_ = trace_.tb_next
    return frame


def _parameter_names(model: nn.Module) -> tuple[list[str], bool]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return names, any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


def _named_args(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    names, variadic = _parameter_names(model)
    if variadic or len(args) > len(names):
        names = names[: len(args)]
        names += [f"args_{i}" for i in range(len(args) - len(names))]
    return dict(zip(names, args, strict=False))


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: tuple[int, ...]
) -> Any:
    def shapes_of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return None
        return {d: torch.export.Dim.AUTO for d in dims if d == 0 or _is_length(value)}

    tree = pytree.tree_map(shapes_of, (tuple(args), kwargs))
    return tuple(tree[0]) if not kwargs else _by_name(model, args, tree)


def _by_name(model: nn.Module, args: tuple[Any, ...], tree: Any) -> Any:
    names = list(_named_args(model, args))
    if any(n.startswith("args_") for n in names):
        return None
    return dict(zip(names, tree[0], strict=True)) | tree[1]


def _is_length(value: torch.Tensor) -> bool:
    """Dim 1 of token ids, masks and [batch, length, features] is a length; channels are not."""
    floating = value.is_floating_point() or value.is_complex()
    return value.dim() == 3 if floating else value.dim() >= 2


def _root_of(model: nn.Module, program: torch.export.ExportedProgram) -> nn.Module:
    """Return plain containers that hold the user's own tensors under the user's own names."""
    root = nn.Module()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        attach(root, name, parameter)
    persistent = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        attach(root, name, buffer, persistent=name in persistent)
    known = {n for n, _ in root.named_buffers(remove_duplicate=False)}
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and name not in known:
            attach(root, name, value.detach(), persistent=False)
    root.training = model.training
    return root


def attach(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
    """Put a tensor under a dotted name, making plain containers on the way."""
    parent = root
    *path, leaf = name.split(".")
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        parent.register_parameter(leaf, tensor)
    else:
        parent.register_buffer(leaf, tensor, persistent=persistent)


def _unlifted(program: torch.export.ExportedProgram, root: nn.Module) -> fx.Graph:
    """Copy the exported graph with get_attr nodes for state, sub-graphs inlined, plain metadata."""
    graph = fx.Graph()
    copier = _Copier(graph, program.graph_module, root)
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    kind = torch.export.graph_signature.InputKind
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == kind.USER_INPUT:
                copier.placeholder(node)
            elif node.users:
                copier.state(node, spec.target)
    outputs = [s for s in program.graph_signature.output_specs]
    flat = copier.body(program.graph)
    user = torch.export.graph_signature.OutputKind.USER_OUTPUT
    graph.output([v for v, s in zip(flat, outputs, strict=True) if s.kind == user])
    return graph


class _Copier:
    """Copies nodes into one flat graph; what a node became is looked up by identity."""

    def __init__(self, graph: fx.Graph, owner: nn.Module, root: nn.Module) -> None:
        self.graph, self.owner, self.root = graph, owner, root
        self.env: dict[fx.Node, Any] = {}

    def placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self.env[node] = self._described(self.graph.placeholder(node.name), node)
        else:
            self.env[node] = value

    def state(self, node: fx.Node, target: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.env[node] = self._described(self.graph.get_attr(target), node)

    def body(self, source: fx.Graph) -> Any:
        for node in source.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr":
                self._attribute(node)
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: self.env[n])
        raise AssertionError("a graph without output")

    def _attribute(self, node: fx.Node) -> None:
        value = getattr(self.owner, str(node.target), None)
        if isinstance(value, torch.Tensor):
            self.root.register_buffer(str(node.target), value.detach(), persistent=False)
            self.env[node] = self._described(self.graph.get_attr(str(node.target)), node)

    def _call(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", "")
        if name.startswith("wrap_with"):
            self._inline(node)
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise TraceError(
                f"no support for the control flow {name!r} at {source_of(node)}; "
                "branch on Python values, or use torch.where"
            )
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        picked = args and isinstance(args[0], (tuple, list)) and name == "getitem"
        if picked:
            self.env[node] = args[0][args[1]]
            return
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        self.env[node] = self._described(new, node)

    def _inline(self, node: fx.Node) -> None:
        """with no_grad / autocast: the body runs in line; the user's own context stays theirs."""
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
        name = str(node.args[at].target)  # type: ignore[union-attr]
        module = getattr(self.owner, name)
        inner = _Copier(self.graph, module, self.root)
        holes = [n for n in module.graph.nodes if n.op == "placeholder"]
        for hole, value in zip(holes, node.args[at + 1 :], strict=True):
            inner.env[hole] = fx.map_arg(value, lambda n: self.env[n])
        self.env[node] = inner.body(module.graph)

    def _described(self, new: fx.Node, old: fx.Node) -> fx.Node:
        new.meta["shape"] = info_of(old.meta.get("val"))
        new.meta["source"] = source_of(old) or ""
        value = old.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            new.meta["storage"] = value.untyped_storage()._cdata
        return new


def _signature(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    program: torch.export.ExportedProgram,
) -> Signature:
    names = _named_args(model, args)
    inputs = tuple(_input(name, value) for name, value in (names | kwargs).items())
    order = _parameter_names(model)[0]
    positional = tuple(names) + tuple(n for n in order if n not in names)
    return Signature(positional, inputs, program.call_spec.out_spec)


def _input(name: str, value: Any) -> Input:
    leaves, spec = pytree.tree_flatten(value)
    is_tensor = tuple(isinstance(v, torch.Tensor) for v in leaves)
    constants = tuple(None if t else v for v, t in zip(leaves, is_tensor, strict=True))
    return Input(name, spec, constants, is_tensor, tuple(map(_bounds, leaves)))


def _bounds(value: Any) -> tuple[float, float] | None:
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() > 0
    if not plain or value.is_meta or value.is_complex():
        return None
    low, high = (float(n) for n in torch.aminmax(value.detach().to(torch.float64)))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None

