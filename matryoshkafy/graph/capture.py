"""capture(): torch.export, or the path that the example takes, in one frozen form."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.assumptions import assumed, example_only
from matryoshkafy.graph.guards import Guard
from matryoshkafy.graph.nodes import TORCH_FOLDER, outputs_of
from matryoshkafy.graph.quiet import modes_kept, silent
from matryoshkafy.graph.signature import named_args


@dataclass(frozen=True)
class Captured:
    """A graph with lifted state: which placeholder is which tensor of the model.

    `outputs` are the positions of the user's outputs among the graph's; `constants` tensors that
    the model holds neither as parameters nor as buffers; `guards` what the graph assumes of the
    sizes of its tensor inputs; `notes` remarks for the plan.
    """

    module: fx.GraphModule
    state: Mapping[str, str]
    outputs: tuple[int, ...]
    out_spec: pytree.TreeSpec
    constants: Mapping[str, Any]
    guards: tuple[Guard, ...]
    notes: tuple[str, ...] = ()


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Export with dynamic batch and length, else dynamic batch, else with the example's sizes.

    A forward that branches on the values of tensors is recorded along the path of the example.
    Raises `TraceError` that names the user's line.
    """
    with _prepared(model):
        errors: list[BaseException] = []
        for dims, note in ATTEMPTS:
            try:
                shapes = _dynamic_shapes(model, args, kwargs, dims) if dims else None
                return _exported(_quiet_export(model, args, kwargs, shapes), note)
            except Exception as error:  # noqa: BLE001  torch.export raises errors of every kind
                errors.append(error)
            if _depends_on_values(errors[-1]):
                break
        return _recorded(model, args, kwargs, errors[-1])


ATTEMPTS = (
    ((0, 1), ()),
    ((0,), ("only the batch size may differ from the example's",)),
    ((), ("traced with the example's sizes: other batch sizes need a new trace",)),
)


def _exported(program: torch.export.ExportedProgram, notes: tuple[str, ...]) -> Captured:
    kinds = torch.export.graph_signature
    signature = program.graph_signature
    state = {
        s.arg.name: str(s.target)
        for s in signature.input_specs
        if s.kind != kinds.InputKind.USER_INPUT
    }
    outputs = tuple(
        i for i, s in enumerate(signature.output_specs) if s.kind == kinds.OutputKind.USER_OUTPUT
    )
    constants = {n: c for n, c in program.constants.items() if isinstance(c, torch.Tensor)}
    spec = program.call_spec.out_spec
    assert spec is not None
    guards = assumed(_inputs(program.graph_module.graph, state))
    return Captured(program.graph_module, state, outputs, spec, constants, guards, notes)


def _inputs(graph: fx.Graph, state: Mapping[str, str]) -> list[torch.Tensor]:
    """Return the traced values of the user's tensor inputs, in the order of the call."""
    holes = (n for n in graph.nodes if n.op == "placeholder" and n.name not in state)
    values = [n.meta.get("val") for n in holes]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _depends_on_values(error: BaseException) -> bool:
    """Tell whether a forward branches on the values of tensors."""
    return "data-dependent" in str(error) or "DataDependent" in type(error).__name__


def _recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> Captured:
    """Run the example and record every op on its way: branches are taken as the example takes
    them.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    flat, spec = pytree.tree_flatten((args, kwargs))
    out_specs: list[pytree.TreeSpec] = []

    def run(tensors: list[Any], inputs: list[Any]) -> list[Any]:
        inner_args, inner_kwargs = pytree.tree_unflatten(inputs, spec)
        state = dict(zip(named, tensors, strict=True))
        result = torch.func.functional_call(model, state, inner_args, inner_kwargs)
        leaves, out_spec = pytree.tree_flatten(result)
        out_specs.append(out_spec)
        return leaves

    record = make_fx(
        run, pre_dispatch=True, _error_on_data_dependent_ops=False, record_stack_traces=True
    )
    try:
        with warnings.catch_warnings(), silent():
            warnings.simplefilter("ignore")
            module = record(list(named.values()), flat)
    except Exception as second:  # noqa: BLE001  the user's forward may raise anything
        raise TraceError(_explain(model, (args, kwargs), second)) from second
    return _lifted(module, list(named), out_specs[0], error)


def _lifted(
    module: fx.GraphModule, names: list[str], out_spec: pytree.TreeSpec, error: BaseException
) -> Captured:
    _mark_storage(module.graph)
    holes = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    state = dict(zip(holes, names, strict=False))
    count = len(outputs_of(module.graph))
    place = _user_frame(error) or "an unknown line"
    why = "branches on the values of tensors" if _depends_on_values(error) else "cannot be exported"
    note = f"specialised: the forward {why} at {place}; the path of the example inputs was recorded"
    notes = (note, *ATTEMPTS[2][1])
    guards = example_only(_inputs(module.graph, state), place)
    return Captured(module, state, tuple(range(count)), out_spec, {}, guards, notes)


def _mark_storage(graph: fx.Graph) -> None:
    """Say which nodes share memory: what a recorded value was a view of is not kept with it."""
    for node in graph.nodes:
        node.meta["storage"] = node.args[0].meta["storage"] if _is_view(node) else id(node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return False
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    copies = COPIES_IF.get(schema.name.partition("::")[2])
    return copies is None or not copies(old, new)


def _reshape_copies(old: torch.Tensor, new: torch.Tensor) -> bool:
    try:
        old.view(new.shape)
    except (RuntimeError, ValueError):
        return True
    return False


# Ops that return a view where they can, and when they cannot.
COPIES_IF: Mapping[str, Callable[[torch.Tensor, torch.Tensor], bool]] = {
    "contiguous": lambda old, new: old.stride() != new.stride(),
    "to": lambda old, new: (old.dtype, old.device) != (new.dtype, new.device),
    "reshape": _reshape_copies,
    "reshape_as": _reshape_copies,
    "flatten": _reshape_copies,
}


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, plain attention kernels, experts as one batched product; then as before."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    experts = list(_expert_configs(model))
    try:
        for config, _ in experts:
            config._experts_implementation = "batched_mm"
        with modes_kept(model), torch.enable_grad():
            model.eval()
            yield
    finally:
        for config, before in experts:
            config._experts_implementation = before
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _expert_configs(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """A loop over experts depends on the data; transformers offers the same sum as a product."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        before = getattr(config, "_experts_implementation", None)
        if isinstance(before, str) and id(config) not in seen:
            seen.add(id(config))
            yield config, before


def _quiet_export(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> Any:
    with warnings.catch_warnings(), silent():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _explain(model: nn.Module, call: tuple[Any, Any], error: BaseException) -> str:
    """Say whether the forward itself fails on the example, or only its capture."""
    args, kwargs = call
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as own:  # noqa: BLE001  the user's forward may raise anything
        return (
            f"the forward fails on the example inputs{_at(own)}: {_short(own)}\n"
            f"Given: {_described(args, kwargs)}. "
            "Give example inputs with which model(*args, **kwargs) runs."
        )
    return (
        f"the model could not be traced{_at(error)}: {_short(error)}\n"
        "Expected: a forward made of torch operations on its inputs. Rewrite that line with torch "
        "operations, or pass example inputs that avoid it."
    )


def _at(error: BaseException) -> str:
    where = _user_frame(error)
    return f" at {where}" if where else ""


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10) * 2)[0].strip()[:600]}"


def _described(args: Any, kwargs: Any) -> str:
    def word(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return repr(value)[:40]

    words = [word(a) for a in args] + [f"{k}={word(v)}" for k, v in kwargs.items()]
    return f"({', '.join(words)})"


def _user_frame(error: BaseException) -> str | None:
    frame = None
    trace_ = error.__traceback__
    while trace_ is not None:
        code = trace_.tb_frame.f_code
        if not code.co_filename.startswith((TORCH_FOLDER, __file__, "<")):
            frame = f"{code.co_filename}:{trace_.tb_lineno} ({code.co_name})"
        trace_ = trace_.tb_next
    return frame


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
    names = list(named_args(model, args))
    if any(n.startswith("args_") for n in names):
        return None
    return dict(zip(names, tree[0], strict=True)) | tree[1]


def _is_length(value: torch.Tensor) -> bool:
    """Dim 1 of token ids, masks and [batch, length, features] is a length; channels are not."""
    floating = value.is_floating_point() or value.is_complex()
    return value.dim() == 3 if floating else value.dim() >= 2
