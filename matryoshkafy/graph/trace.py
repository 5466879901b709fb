"""trace(): a user's model and example inputs become a torch.fx graph in one vocabulary of ops.

What holds of a `Trace`: the graph lints; every tensor of the model is a `get_attr` under the user's
own name; no node mutates its input; dropout and batch norm follow `self.training`; nothing is bound
to a device; every node carries `meta["info"]` (concrete sizes) and `meta["source"]` (the user's
line), and those that were captured `meta["open"]` (which of their sizes depend on the inputs').
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.capture import Captured, capture
from matryoshkafy.graph.guards import Guards, Size, kind_of
from matryoshkafy.graph.nodes import (
    Argument,
    info_of,
    is_tensor,
    set_info,
    source_of,
    tensor_info,
    writes,
)
from matryoshkafy.graph.normalise import clean
from matryoshkafy.graph.opened import Example
from matryoshkafy.graph.signature import (
    Signature,
    as_tensor,
    named_args,
    parameter_names,
    read_input,
    tensor_names,
)

# How remarks begin that say in what a graph is not its model.
NO_GRADIENTS = "inference only: "
NO_TRAINING = "no training mode: "
# A recorded path has these two where an exported one has a body: the user's autocast stays theirs.
AUTOCAST = (
    cast("Callable[..., object]", torch.amp.autocast_mode._enter_autocast),  # pyright: ignore[reportUnknownMemberType]
    cast("Callable[..., object]", torch.amp.autocast_mode._exit_autocast),  # pyright: ignore[reportUnknownMemberType]
)


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
        return tensors_of(self.root)

    def is_persistent(self, name: str) -> bool:
        """Tell whether the user's state_dict shows this tensor."""
        return name not in self.hidden


def trace(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    larger: bool = True,
) -> Trace:
    """Trace the model on example inputs; the model is left as it was found.

    With `larger`, a batch or length of 1, which torch.export takes as fixed, is traced as 2 where
    the model accepts it. Raises `TraceError` that names the user's line where the model cannot be
    traced.
    """
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    given = Example(*pytree.tree_map(as_tensor, (args, dict(kwargs or {}))))
    captured = capture(model, given, larger=larger)
    root = _root_of(model, captured)
    graph = _unlifted(captured, root)
    signature = _signature(model, given.args, given.kwargs, captured)
    written = clean(graph, root)
    graph.lint()
    shown = set(root.state_dict(keep_vars=True))
    hidden = {n for n, _ in root.named_buffers(remove_duplicate=False) if n not in shown}
    notes = (*captured.notes, *_fixed_sizes(signature.guards, captured.asked), *written)
    return Trace(graph, signature, root, notes, frozenset(hidden))


def _fixed_sizes(guards: Guards, asked: Sequence[Size]) -> Iterator[str]:
    """Say which of the sizes that were left open the forward fixed, and where."""
    for guard in guards.conditions:
        if guard.fixes and guard.sizes[0] in asked:
            where = f", by {guard.source}" if guard.source else ""
            yield f"other sizes are refused: {guards.text(guard)}{where}"


def _root_of(model: nn.Module, captured: Captured) -> nn.Module:
    """Return plain containers that hold the user's own tensors under the user's own names."""
    root = nn.Module()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        attach(root, name, parameter)
    persistent = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        attach(root, name, buffer, persistent=name in persistent)
    known = {n for n, _ in root.named_buffers(remove_duplicate=False)}
    for name, value in captured.constants.items():
        if name not in known:
            attach(root, name, value.detach(), persistent=False)
    root.training = model.training
    return root


def attach(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
    """Put a tensor under a dotted name, making plain containers on the way."""
    parent: Any = root
    *path, leaf = name.split(".")
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]
    if isinstance(tensor, nn.Parameter):
        parent.register_parameter(leaf, tensor)
    else:
        parent.register_buffer(leaf, tensor, persistent=persistent)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, ties under each of their names."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def _unlifted(captured: Captured, root: nn.Module) -> fx.Graph:
    """Copy the captured graph with get_attr nodes for state, sub-graphs inlined, plain metadata."""
    graph = fx.Graph()
    copier = _Copier(graph, captured.module, root)
    for node in captured.module.graph.nodes:
        if node.op == "placeholder" and node.name in captured.state:
            if node.users:
                copier.state(node, captured.state[node.name])
        elif node.op == "placeholder":
            copier.placeholder(node)
    flat = cast("Sequence[Argument]", copier.body(captured.module.graph))
    graph.output([flat[i] for i in captured.outputs])
    return graph


class _Copier:
    """Copies nodes into one flat graph; what a node became is looked up by identity."""

    def __init__(self, graph: fx.Graph, owner: nn.Module, root: nn.Module) -> None:
        self.graph, self.owner, self.root = graph, owner, root
        self.env: dict[fx.Node, Argument] = {}
        self.grad = True
        # Where the forward turns autocast off, which the graph itself cannot.
        self.exact = False

    def placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self.env[node] = self._described(self.graph.placeholder(node.name), node)
        else:
            self.env[node] = value

    def state(self, node: fx.Node, target: str) -> None:
        # get_attr() warns of a name that no module holds yet, and takes its time to look.
        self.env[node] = self._described(self.graph.create_node("get_attr", target), node)

    def body(self, source: fx.Graph) -> Argument:
        for node in source.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr":
                self._attribute(node)
            elif node.op == "output":
                return self._mapped(node.args[0])
        raise AssertionError("a graph without output")

    def _mapped(self, value: Argument) -> Argument:
        return fx.map_arg(value, lambda n: self.env[n])  # type: ignore[return-value]

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
        if node.target is torch._C._set_grad_enabled:
            self.grad = bool(node.args[0])
            return
        if node.target in AUTOCAST:
            self.exact = node.target is AUTOCAST[0] and node.args[2] is False
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise TraceError(
                f"no support for the control flow {name!r} at {source_of(node)}; "
                "branch on Python values, or use torch.where"
            )
        args = tuple(map(self._mapped, node.args))
        kwargs = {key: self._mapped(value) for key, value in node.kwargs.items()}
        if name == "getitem" and isinstance(args[0], (tuple, list)):
            self.env[node] = args[0][cast("int", args[1])]
            return
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        self.env[node] = self._described(new, node)
        if not self.grad:
            self._without_gradient(node, new)

    def _without_gradient(self, node: fx.Node, new: fx.Node) -> None:
        """What is made under no_grad is detached; a write under no_grad is marked."""
        if writes(new):
            new.meta["no_grad"] = True
        elif is_tensor(new) and tensor_info(new).dtype.is_floating_point:
            self.env[node] = self._described(
                self.graph.call_function(torch.ops.aten.detach.default, (new,)), node
            )

    def _inline(self, node: fx.Node) -> None:
        """with no_grad / autocast: the body runs in line; the user's autocast stays theirs."""
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
        name = str(node.all_input_nodes[0].target)
        module: fx.GraphModule = getattr(self.owner, name)
        inner = _Copier(self.graph, module, self.root)
        inner.grad = bool(node.args[0]) if "grad" in str(node.target) else self.grad
        inner.exact = node.args[2] is False if "autocast" in str(node.target) else self.exact
        holes = [n for n in module.graph.nodes if n.op == "placeholder"]
        for hole, value in zip(holes, node.args[at + 1 :], strict=True):
            inner.env[hole] = self._mapped(value)
        self.env[node] = inner.body(module.graph)

    def _described(self, new: fx.Node, old: fx.Node) -> fx.Node:
        set_info(new, info_of(old.meta.get("val")))
        new.meta["source"] = source_of(old) or ""
        if self.exact:
            new.meta["exact"] = True
        value = old.meta.get("val")
        if isinstance(value, torch.Tensor):
            new.meta["open"] = [type(n) is not int for n in value.shape]
        if "storage" in old.meta:
            new.meta["storage"] = old.meta["storage"]
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            new.meta["storage"] = value.untyped_storage()._cdata
        return new


def _signature(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, Any],
    captured: Captured,
) -> Signature:
    names = named_args(model, args)
    given = names | kwargs
    inputs = tuple(read_input(model, name, value) for name, value in given.items())
    tensors = list(tensor_names(given))
    guards = Guards(
        names=tuple(name for name, _ in tensors),
        ranks=tuple(t.dim() for _, t in tensors),
        kinds=tuple(kind_of(t) for _, t in tensors),
        conditions=captured.guards,
    )
    order = parameter_names(model)[0]
    positional = tuple(names) + tuple(n for n in order if n not in names)
    return Signature(positional, inputs, captured.out_spec, guards)
