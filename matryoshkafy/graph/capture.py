"""capture(): torch.export with batch and length dynamic, or the example's path, in one form."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.assumptions import assumed, example_only
from matryoshkafy.graph.copies import copied_inputs, copied_tensor, spare
from matryoshkafy.graph.guards import Guard, Size
from matryoshkafy.graph.holders import holds, refuse_opaque
from matryoshkafy.graph.nodes import (
    outputs_of,
)
from matryoshkafy.graph.opened import (
    Example,
    Shapes,
    companions,
    dynamic_shapes,
    is_open,
    open_sizes,
)
from matryoshkafy.graph.paths import CHECKED
from matryoshkafy.graph.quiet import plain_attention, silent, uncollected
from matryoshkafy.graph.recorded import add_checks
from matryoshkafy.graph.storage import aliases_of, mark_storage
from matryoshkafy.graph.transforms import GradientsRead, Transformed, watched
from matryoshkafy.graph.user_lines import error_line


@dataclass(frozen=True)
class Captured:
    """A graph with lifted state: which placeholder is which tensor of the model.

    `outputs` are the positions of the user's outputs among the graph's; `constants` tensors that
    the model holds neither as parameters nor as buffers; `guards` what the graph assumes of the
    sizes of its tensor inputs; `asked` the sizes that were left open; `notes` remarks for the plan.
    """

    module: fx.GraphModule
    state: Mapping[str, str]
    outputs: tuple[int, ...]
    out_spec: pytree.TreeSpec
    constants: Mapping[str, torch.Tensor]
    guards: tuple[Guard, ...]
    asked: tuple[Size, ...]
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> frozenset[Size]:
        """The sizes that were left open, and that the forward holds to the example's number."""
        return frozenset(g.sizes[0] for g in self.guards if g.fixes) & frozenset(self.asked)


def capture(model: nn.Module, given: Example, *, larger: bool = True) -> Captured:
    """Export with dynamic batch and length, else dynamic batch, else with the example's sizes.

    A forward that branches on the values of tensors is recorded along the path of the example.
    Each attempt has a spare of the model to itself, since a trace that fails half way may leave
    traced values in it. Raises `TraceError` that names the user's line.
    """
    call = _apart(model, given)
    with silent(), uncollected():
        errors: list[BaseException] = []
        wide = _enlarged(model, call) if larger else call
        for dims, note in ATTEMPTS:
            try:
                return _taking(model, call, wide if dims else call, (dims, note))
            except Exception as error:  # noqa: BLE001  torch.export raises errors of every kind
                errors.append(error)
            if _depends_on_values(errors[-1]) or isinstance(errors[-1], Transformed):
                break
        return _recorded(model, call, errors[-1])


def _apart(model: nn.Module, call: Example) -> Example:
    """Return the call with tensors of its own where one stands twice, or is the model's: export
    takes one object for one value, wherever it comes in.
    """
    met = {id(t) for t in (*model.parameters(), *model.buffers())}

    def own(value: torch.Tensor) -> torch.Tensor:
        if id(value) in met:
            return copied_tensor(value)
        met.add(id(value))
        return value

    return Example(*pytree.tree_map_only(torch.Tensor, own, (call.args, call.kwargs)))


# How the remark begins that only the path of the example was recorded.
SPECIALISED = "specialised: "

# From the most that may stay open to the least; what an attempt gives up, its remark says.
Attempt = tuple[tuple[int, ...], tuple[str, ...]]
ATTEMPTS: tuple[Attempt, ...] = (
    ((0, 1), ()),
    ((0,), ("only the batch size may differ from the example's",)),
    ((), ("traced with the example's sizes: other batch sizes need a new trace",)),
)


def _taking(model: nn.Module, call: Example, larger: Example, attempt: Attempt) -> Captured:
    """Export a larger call; the user's own where a graph of the larger one does not take it."""
    dims, notes = attempt
    found = _freed(model, larger, _attempt(model, larger, open_sizes(larger, dims), notes))
    return found if _takes(found, call) else _attempt(model, call, open_sizes(call, dims), notes)


def _freed(model: nn.Module, call: Example, found: Captured) -> Captured:
    """Export again with sizes open that may be the same length; as before where that frees none."""
    more = companions(call, found.asked, found.held)
    if not more:
        return found
    try:
        again = _attempt(model, call, (*found.asked, *more), found.notes)
    except Exception:  # noqa: BLE001  torch.export raises errors of every kind
        return found
    again = replace(again, asked=found.asked)
    return again if again.held < found.held else found


def _attempt(
    model: nn.Module, call: Example, asked: tuple[Size, ...], notes: tuple[str, ...]
) -> Captured:
    """Export once; a model that makes attributes at its first call is called before."""
    shapes = dynamic_shapes(model, call, asked)
    try:
        with _prepared(model, above=True, gradients=False) as spared:
            return _exported(_export(spared.twin, call, shapes), spared, asked, notes)
    except GradientsRead:
        with _prepared(model, above=True) as spared:
            return _exported(_export(spared.twin, call, shapes), spared, asked, notes)
    except Exception as error:  # noqa: BLE001  torch.export raises errors of every kind
        if "assigned during export" not in str(error):
            raise
    with _prepared(model, above=True) as spared:
        args, kwargs = copied_inputs(call.args, call.kwargs)
        spared.twin(*args, **kwargs)
        return _exported(_export(spared.twin, call, shapes), spared, asked, notes)


def _enlarged(model: nn.Module, call: Example) -> Example:
    """Return an example of batch and length 2 where they are 1, which torch.export takes as fixed.

    Only where the model accepts it.
    """
    for dims in ((0, 1), (0,), (1,)):
        larger = _repeated(call, dims)
        if larger is not None and _failure(model, larger) is None:
            return larger
    return call


def _takes(found: Captured, call: Example) -> bool:
    """Tell whether a graph is right for the sizes of a call."""
    shapes = [tuple(t.shape) for t in call.tensors()]
    return all(guard.holds(shapes) for guard in found.guards)


def _repeated(call: Example, dims: tuple[int, ...]) -> Example | None:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    for dim in dims:
        at = [i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor) and is_open(v, dim)]
        if not at or any(leaves[i].shape[dim] != 1 for i in at):
            return None
        for i in at:
            leaves[i] = torch.cat([leaves[i].detach()] * 2, dim)
    return Example(*pytree.tree_unflatten(leaves, spec))


def _failure(model: nn.Module, call: Example) -> Exception | None:
    """Return what the forward raises on an example."""
    args, kwargs = copied_inputs(call.args, call.kwargs)
    try:
        with _prepared(model) as spared, torch.no_grad():
            spared.twin(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  the user's forward may raise anything
        return error
    return None


def _exported(
    program: torch.export.ExportedProgram,
    spared: Spared,
    asked: tuple[Size, ...],
    notes: tuple[str, ...],
) -> Captured:
    kinds = torch.export.graph_signature
    signature = program.graph_signature
    constants = {n: c for n, c in program.constants.items() if isinstance(c, torch.Tensor)}
    aliases = aliases_of(constants, spared.twin)
    state = {
        s.arg.name: aliases.get(str(s.target), str(s.target))
        for s in signature.input_specs
        if s.kind != kinds.InputKind.USER_INPUT
    }
    outputs = tuple(
        i for i, s in enumerate(signature.output_specs) if s.kind == kinds.OutputKind.USER_OUTPUT
    )
    constants = {n: c for n, c in constants.items() if n not in aliases}
    spec = program.call_spec.out_spec
    assert spec is not None
    guards = assumed(_inputs(program.graph_module.graph, state))
    module = program.graph_module
    notes = (*notes, *spared.notes)
    return Captured(module, state, outputs, spec, constants, guards, asked, notes)


def _inputs(graph: fx.Graph, state: Mapping[str, str]) -> list[torch.Tensor]:
    """Return the traced values of the user's tensor inputs, in the order of the call."""
    holes = (n for n in graph.nodes if n.op == "placeholder" and n.name not in state)
    values = [n.meta.get("val") for n in holes]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _depends_on_values(error: BaseException) -> bool:
    """Tell whether a forward branches on the values of tensors."""
    return "data-dependent" in str(error) or "DataDependent" in type(error).__name__


def _recorded(model: nn.Module, call: Example, error: BaseException) -> Captured:
    """Run the example and record every op on its way: branches are taken as the example takes
    them.
    """
    flat, spec = pytree.tree_flatten((call.args, call.kwargs))
    out_specs: list[pytree.TreeSpec] = []
    opaque: set[str] = set()
    with _prepared(model, recorded=True) as spared:
        twin = spared.twin
        named = dict(twin.named_parameters()) | dict(twin.named_buffers())

        def run(tensors: list[torch.Tensor], inputs: list[object]) -> list[object]:
            args, kwargs = pytree.tree_unflatten(inputs, spec)
            state = dict(zip(named, tensors, strict=True))
            result = torch.func.functional_call(twin, state, args, kwargs)
            leaves, out_spec = pytree.tree_flatten(result)
            out_specs.append(out_spec)
            opaque.update(type(leaf).__name__ for leaf in leaves if holds(leaf))
            return leaves

        record = make_fx(
            run,
            pre_dispatch=not isinstance(error, Transformed),
            _error_on_data_dependent_ops=False,
            record_stack_traces=True,
        )
        try:
            module = record(list(named.values()), flat)
        except Exception as second:  # noqa: BLE001  the user's forward may raise anything
            refuse_opaque(opaque)
            raise TraceError(_explain(model, call, second)) from second
    refuse_opaque(opaque)
    place = error_line(error) or "an unknown line"
    with spare(model) as again:
        checked = add_checks(module, [*again.parameters(), *again.buffers()], flat, place)
    for hole, value in zip(
        module.graph.find_nodes(op="placeholder")[len(named) :], flat, strict=True
    ):
        if isinstance(value, torch.Tensor):  # make_fx says nothing of sparse inputs
            hole.meta["val"] = value
    how = f"the path of the example inputs was recorded{f', and {CHECKED}' if checked else ''}"
    note = f"{SPECIALISED}the forward {_why(error)} at {place}; {how}"
    notes = (note, *ATTEMPTS[2][1], *spared.notes)
    return replace(_lifted(module, list(named), out_specs[0], place), notes=notes)


def _why(error: BaseException) -> str:
    """Say why a forward was recorded."""
    if _depends_on_values(error):
        return "branches on the values of tensors"
    if isinstance(error, Transformed):
        return "differentiates or maps itself (torch.autograd.grad, torch.func)"
    return "cannot be exported"


def _lifted(
    module: fx.GraphModule, names: list[str], out_spec: pytree.TreeSpec, place: str
) -> Captured:
    mark_storage(module.graph)
    holes = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    state = dict(zip(holes, names, strict=False))
    count = len(outputs_of(module.graph))
    guards = example_only(_inputs(module.graph, state), place)
    return Captured(module, state, tuple(range(count)), out_spec, {}, guards, ())


@dataclass(frozen=True)
class Spared:
    """A spare that is traced, and what is noted of its forward on the way."""

    twin: nn.Module
    notes: list[str]


@contextlib.contextmanager
def _prepared(
    model: nn.Module, *, above: bool = False, gradients: bool = True, recorded: bool = False
) -> Generator[Spared]:
    """Yield a spare in evaluation mode, with plain attention kernels and experts as one batched
    product; see `watched` for the rest.
    """
    with plain_attention(), spare(model) as twin:
        experts = list(_expert_configs(twin))
        try:
            for config, _ in experts:
                config._experts_implementation = "batched_mm"
            twin.eval()
            # Under the caller's no_grad, the model's own would leave no trace.
            bare = contextlib.nullcontext() if gradients else _without_gradients(twin)
            watch = watched(twin, above=above, gradients=gradients, recorded=recorded)
            with torch.enable_grad(), bare, watch as noted:
                yield Spared(twin, noted)
        finally:
            for config, before in experts:
                config._experts_implementation = before


@contextlib.contextmanager
def _without_gradients(twin: nn.Module) -> Generator[None]:
    """Take the gradients off a spare: its trace has the same ops, and takes a tenth less time."""
    # What cannot be copied is shared with the user's model, so all is put back.
    parameters = [p for p in twin.parameters() if p.requires_grad and p.is_leaf]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _expert_configs(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """A loop over experts depends on the data; transformers offers the same sum as a product."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        before = getattr(config, "_experts_implementation", None)
        if isinstance(before, str) and id(config) not in seen:
            seen.add(id(config))
            yield config, before


def _export(model: nn.Module, call: Example, shapes: Shapes) -> torch.export.ExportedProgram:
    return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)


def _explain(model: nn.Module, call: Example, error: BaseException) -> str:
    """Say whether the forward itself fails on the example, or only its capture."""
    own = _failure(model, call)
    if own is not None:
        return (
            f"the forward fails on the example inputs{_at(own)}: {_short(own)}\n"
            f"Given: {_described(call.args, call.kwargs)}. "
            "Give example inputs with which model(*args, **kwargs) runs."
        )
    return (
        f"the model could not be traced{_at(error)}: {_short(error)}\n"
        "Expected: a forward made of torch operations on its inputs. Rewrite that line with torch "
        "operations, or pass example inputs that avoid it."
    )


def _at(error: BaseException) -> str:
    where = error_line(error)
    return f" at {where}" if where else ""


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10) * 2)[0].strip()[:600]}"


def _described(args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    def word(value: object) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return repr(value)[:40]

    words = [word(a) for a in args] + [f"{k}={word(v)}" for k, v in kwargs.items()]
    return f"({', '.join(words)})"
