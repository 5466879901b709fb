"""compared(): a traced graph trains as its model does, or it is said that it cannot.

Outputs and gradients are compared on the example, in evaluation and in training mode: parameters
and floating inputs, against a fixed random direction of every output. What a trace cannot hold (the
backward of a custom autograd Function, a hook, a branch on `self.training`) shows here. One forward
of a model serves all that is asked of a mode.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.backward import Step, functions, repacked, steps, structure
from matryoshkafy.dolls.later_calls import made
from matryoshkafy.dolls.measure import tensor_error
from matryoshkafy.errors import first_line
from matryoshkafy.graph.copies import (
    chance_kept,
    copied_inputs,
    reseed_others,
    seed_torch,
    spare,
    untouched,
)
from matryoshkafy.graph.function_mode import FunctionMode
from matryoshkafy.graph.nodes import op_key, output_node, set_info, tensor_info
from matryoshkafy.graph.trace import NO_GRADIENTS, NO_TRAINING, Trace
from matryoshkafy.graph.training_mode import (
    DROPOUTS,
    SDPA,
    Watch,
    follow,
    follow_training,
    named_arguments,
)

# Relative to the largest gradient of all: some gradients are zero but for rounding (the bias of
# keys in attention).
FLOOR = 1e-3
# What torch.utils.checkpoint calls its autograd Function with use_reentrant=True.
REENTRANT = "CheckpointFunction"
# Whoever asks for a step of the backward may hook it, and no step tells its hooks.
HOOKS = frozenset({cast("Any", Tensor).register_hook, cast("Any", Tensor.grad_fn).__get__})


@dataclass(frozen=True)
class Behaviour:
    """What a model or graph gave: outputs, what may have a gradient, what it holds afterwards.

    `smooth` are the outputs that autograd follows; `hooked` whether a hook was set on the way,
    `dropped` whether dropout would have dropped something, `kept` the plain attributes that the
    call made or changed.
    """

    outputs: tuple[Tensor, ...]
    smooth: tuple[Tensor, ...]
    wanted: dict[str, Tensor]
    state: dict[str, Tensor]
    hooked: bool = False
    dropped: bool = False
    kept: tuple[str, ...] = ()

    @cached_property  # a backward frees what it needs, and one answer may stand for both modes
    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by name, along fixed random directions of the outputs."""
        if not self.smooth or not self.wanted:
            return {}
        # A random direction instead of ones: the gradient of a softmax along ones is zero.
        draw = torch.Generator().manual_seed(0)
        directions = [
            torch.randn(v.shape, generator=draw, dtype=torch.float64).to(v) for v in self.smooth
        ]
        leaves = list(self.wanted.values())
        with chance_kept():  # a reversible layer computes its forward again, with its own seed
            found = cast(
                "tuple[Tensor | None, ...]",
                torch.autograd.grad(self.smooth, leaves, directions, allow_unused=True),
            )
        return {n: g for n, g in zip(self.wanted, found, strict=True) if g is not None}

    @cached_property
    def steps(self) -> set[Step]:
        """Return the steps of the backward."""
        return steps(self.smooth)

    def same_ops(self, other: Behaviour) -> bool:
        """Tell whether the backward of both has the same ops in the same places."""
        return structure(self.steps, self.wanted) == structure(other.steps, other.wanted)


@dataclass(frozen=True)
class Pair:
    """What a model gave, and what its traced graph gave (or `why` it gave nothing)."""

    expected: Behaviour
    found: Behaviour | None
    why: str = ""

    def error(self) -> float:
        """Return the largest relative error of the outputs."""
        if self.found is None or _shapes(self.found) != _shapes(self.expected):
            return float("inf")
        return max(map(tensor_error, self.found.outputs, self.expected.outputs), default=0.0)

    def difference(self, tolerance: float) -> str:
        """Return "" where outputs, what is written, and gradients agree; else what differs.

        Args:
            tolerance: relative error of an output; gradients get ten times as much.
        """
        if self.found is None:
            return self.why
        try:
            return self._difference(self.found, tolerance) or _other_gradient(
                self.found, self.expected, 10 * tolerance
            )
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return _fails(error)

    def _difference(self, found: Behaviour, tolerance: float) -> str:
        shapes = [_shapes(answer) for answer in (found, self.expected)]
        if shapes[0] != shapes[1]:
            return f"the outputs have the shapes {shapes[0]}, the model's {shapes[1]}"
        error = self.error()
        if not error <= tolerance:
            return f"the outputs are off by {error:.1e}"
        return _other_state(found, self.expected)


def _shapes(answer: Behaviour) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in answer.outputs]


def _fails(error: Exception) -> str:
    return f"the graph fails where the model does not ({first_line(error)})"


def compared(
    trace: Trace, model: nn.Module, flat: Sequence[Tensor], *, training: bool
) -> Pair | None:
    """Run graph and model on a call with gradients; None where the model itself cannot.

    Args:
        trace: the traced model; its graph is what a sliced doll computes at full width.
        model: the user's.
        flat: the flat tensors of a call.
        training: the mode of both. Dropout drops nothing.
    """
    expected = _of_model(trace, model, flat, training=training)
    return None if expected is None else _beside(expected, trace, flat, training=training)


def _beside(expected: Behaviour, trace: Trace, flat: Sequence[Tensor], *, training: bool) -> Pair:
    try:
        return Pair(expected, _of_graph(trace, flat, training=training))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Pair(expected, None, _fails(error))


def trained(
    trace: Trace, model: nn.Module, flat: Sequence[Tensor], evaluated: Pair | None
) -> tuple[Trace, Pair | None]:
    """Return the trace with what training mode does alone, and graph and model in that mode.

    The model runs once, watched. Where no op of the graph but dropout depends on the mode, the
    graph would compute again what it gave in evaluation mode.
    """
    trace = replace(trace, notes=(*trace.notes, *_hooked(model)))
    watch = Watch()
    expected = _of_model(trace, model, flat, training=True, watch=watch)
    if expected is None:
        return follow_training(trace, model, *trace.signature.call(flat)), None
    trace = follow(trace, watch)
    if evaluated is not None and evaluated.found is not None and has_one_mode(trace.graph):
        return trace, Pair(expected, evaluated.found)
    return trace, _beside(expected, trace, flat, training=True)


def _hooked(model: nn.Module) -> list[str]:
    """Say which gradients go through hooks of the user's, which stay with a parameter."""
    hooked = [n for n, p in model.named_parameters() if _hooks_of(p)]
    more = f" and {len(hooked) - 3} more" if len(hooked) > 3 else ""
    said = (
        f"hooks: on the gradients of {', '.join(hooked[:3])}{more} are those of this model's own "
    )
    return [f"{said}parameters; a slice and a loaded doll have none"] if hooked else []


def _hooks_of(parameter: nn.Parameter) -> bool:
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(parameter, kind, None) for kind in kinds)


def has_one_mode(graph: fx.Graph) -> bool:
    """Tell whether `self.training` is read by dropout alone."""
    dropped = {*DROPOUTS.values(), SDPA.__name__}
    readers = [n for flag in graph.find_nodes(op="get_attr", target="training") for n in flag.users]
    rates = [n for n in readers if n.target is operator.mul]
    ops = [n for n in readers if n not in rates] + [n for rate in rates for n in rate.users]
    return all(op_key(n) in dropped for n in ops)


def without_gradients(trace: Trace, why: str) -> Trace:
    """Return the trace of a graph that does not train as its model: its outputs carry none."""
    _detach_outputs(trace.graph)
    note = f"{NO_GRADIENTS}{why}; the outputs carry no gradient, and train() is refused"
    return replace(trace, notes=(*trace.notes, note))


def without_training(trace: Trace, why: str) -> Trace:
    """Return the trace of a graph that is its model in evaluation mode alone."""
    note = f"{NO_TRAINING}{why}; train() is refused"
    return replace(trace, notes=(*trace.notes, note))


def _of_model(
    trace: Trace,
    model: nn.Module,
    flat: Sequence[Tensor],
    *,
    training: bool,
    watch: Watch | None = None,
) -> Behaviour | None:
    """None where the model itself cannot be trained on the example."""
    mine, leaves = _fresh(flat)
    args, kwargs = trace.signature.call(mine)
    try:
        with spare(model) as twin, torch.enable_grad(), _NoDropout() as plain:
            if training:
                twin = twin if model.training else twin.train()
            else:
                twin.eval()
            seed_torch(0)
            reseed_others(0)  # what they drew while it was traced is a constant of the graph
            with watch or contextlib.nullcontext():
                result = twin(*args, **kwargs)
            answer = _answer(result, twin, leaves)
            kept = tuple(made(model, twin))
            return replace(answer, hooked=plain.hooked, dropped=plain.dropped, kept=kept)
    except Exception:  # noqa: BLE001  the user's forward may raise anything
        return None


def _of_graph(trace: Trace, flat: Sequence[Tensor], *, training: bool) -> Behaviour:
    mine, leaves = _fresh(flat)
    with spare(trace.root) as root, torch.enable_grad():
        root.training = training
        seed_torch(0)
        result = _WithoutDropout(root, graph=trace.graph).run(*mine)
        return _answer(trace.signature.unflatten(result), root, leaves)


def _fresh(flat: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return inputs of a call's own; what may have a gradient stands beside them by number.

    A leaf may not be written in place, so the call gets copies.
    """
    args, _ = copied_inputs(flat, {})
    leaves = {f"input {i}": t.requires_grad_() for i, t in enumerate(args) if t.is_floating_point()}
    return [t.clone() for t in args], leaves


def _answer(result: object, model: nn.Module, leaves: dict[str, Tensor]) -> Behaviour:
    outputs = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = parameters | dict(model.named_buffers(remove_duplicate=False))
    return Behaviour(
        outputs=tuple(v.detach() for v in outputs),
        smooth=tuple(v for v in outputs if v.requires_grad),
        wanted={name: t for name, t in (parameters | leaves).items() if t.requires_grad},
        state={n: t.detach() for n, t in state.items() if t.layout == torch.strided},
    )


def _other_state(found: Behaviour, expected: Behaviour) -> str:
    """Tell what the forward writes that the graph does not; batch norm's are written by both."""
    for name, mine in found.state.items():
        theirs = expected.state.get(name)
        counts = name.endswith("num_batches_tracked")
        if theirs is None or counts or untouched(mine, theirs) or torch.equal(mine, theirs):
            continue
        if tensor_error(mine, theirs) > FLOOR:
            return f"the forward writes into {name!r}, which the graph leaves as it is"
    return ""


def _other_gradient(found: Behaviour, expected: Behaviour, tolerance: float) -> str:
    own = functions(expected.steps)
    hooked = own or expected.hooked or repacked(expected.steps)
    if not hooked and found.same_ops(expected):
        return ""  # the same ops of torch's in the same places: nothing is left to compute
    if REENTRANT in own:
        return "the gradients of a reentrant checkpoint cannot be traced (use_reentrant=False can)"
    try:
        theirs = expected.gradients
    except Exception:  # noqa: BLE001  the user's backward may raise anything
        return ""  # the model itself cannot be trained
    mine = found.gradients
    # Errors count against the largest gradient of all: that of a bias before a norm is rounding.
    scale = max((float(g.abs().max()) for g in theirs.values() if g.numel()), default=0.0)
    if scale != scale or scale == float("inf"):
        return ""
    # No gradient on one side is a gradient of zeros: autograd may leave out what does not count.
    for name in mine.keys() | theirs.keys():
        pair = [gradients.get(name) for gradients in (mine, theirs)]
        there = next(g for g in pair if g is not None)
        a, b = (g if g is not None else torch.zeros_like(there) for g in pair)
        error = tensor_error(a, b, max(FLOOR * scale, 1e-30))
        if not error <= tolerance:
            by = f" (the model has backward functions of its own: {', '.join(own)})" if own else ""
            return f"the gradient of {name!r} is off by {error:.1e}{by}"
    return ""


class _NoDropout(FunctionMode):
    """Dropout that drops nothing, so that a graph and a model of other random numbers compare; a
    hook on a value is noted.
    """

    WATCHED = HOOKS | {SDPA, F.multi_head_attention_forward, *DROPOUTS}
    hooked = dropped = False

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        kwargs = dict(kwargs)
        self.hooked |= func in HOOKS
        if func in DROPOUTS:
            given = named_arguments(func, args, kwargs)
            self.dropped |= bool(given["training"] and given["p"])
            return given["input"]
        if func is SDPA:
            self.dropped |= bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0))
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0, **_after(args)}
        if func is F.multi_head_attention_forward:
            kwargs = named_arguments(func, args, kwargs)
            self.dropped |= bool(kwargs["training"] and kwargs["dropout_p"])
            args, kwargs = (), kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


def _after(args: Sequence[object]) -> dict[str, object]:
    return {"is_causal": args[5]} if len(args) > 5 else {}


class _WithoutDropout(fx.Interpreter):
    """Runs a graph in which dropout drops nothing."""

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a node."""
        key = op_key(target)
        if key in DROPOUTS.values():
            return args[0]
        if key == SDPA.__name__:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0, **_after(args)}
        return super().call_function(target, args, kwargs)


def _detach_outputs(graph: fx.Graph) -> None:
    end = output_node(graph)
    for value in dict.fromkeys(end.all_input_nodes):
        if not hasattr(value.meta.get("info"), "dtype"):
            continue
        with graph.inserting_before(end):
            still = graph.call_function(torch.ops.aten.detach.default, (value,))
        still.meta = dict(value.meta)
        set_info(still, tensor_info(value))
        end.replace_input_with(value, still)
