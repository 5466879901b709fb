"""traced(): a trace that was compared with the model, at the example's sizes and at others."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.gradients import (
    Pair,
    compared,
    has_one_mode,
    trained,
    without_gradients,
    without_training,
)
from matryoshkafy.dolls.later_calls import (
    answer,
    answer_to,
    call,
    inputs_set,
    memory,
    numbers_kept,
    refuse_memory,
    refuse_new_parameters,
    refuse_other_path,
)
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.copies import (
    chance_kept,
    copied_inputs,
    copied_tensor,
    seed_torch,
    spare,
)
from matryoshkafy.graph.holders import refuse_filled
from matryoshkafy.graph.opened import Example
from matryoshkafy.graph.quiet import modes_kept, plain_attention, silent
from matryoshkafy.graph.signature import as_tensor, named_args, tensor_names
from matryoshkafy.graph.storage import refuse_shared
from matryoshkafy.graph.trace import Trace, tensors_of, trace
from matryoshkafy.graph.training_mode import follow_training
from matryoshkafy.graph.trials import from_one, settled, tied, trials_of

FAST_PATH = (
    "without gradients torch's encoder layers take a fast path that writes zeros where a padding "
    "mask hides; the doll computes as with torch.backends.mha.set_fastpath_enabled(False)"
)
# Graph and model run the same ops in the same order: what differs is a rounding here and there.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}


def traced(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    *,
    check: bool = True,
) -> Trace:
    """Trace the model, and refuse a graph that computes something else on the example.

    With `check`, graph and model also run at another batch and length, and at 1; sizes at which
    they differ are fixed. Their gradients are compared, and their training modes: where these
    differ, the doll is for inference only, and says so. Raises `TraceError`.
    """
    refuse_shared(model)
    try:
        return _traced(model, args, kwargs, check=check, larger=True)
    except OtherValues:
        if not any(1 in t.shape for t in Example(tuple(args), dict(kwargs or {})).tensors()):
            raise
    # What one row alone goes through (if len(x) == 1) no trace of two rows sees.
    return _traced(model, args, kwargs, check=check, larger=False)


class OtherValues(TraceError):
    """A graph that computes something else than its model on the example."""


def _traced(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    *,
    check: bool,
    larger: bool,
) -> Trace:
    with silent():
        first = _first(model, args, dict(kwargs or {}))
    found = trace(model, args, kwargs, larger=larger)
    flat = found.signature.flatten(args, dict(kwargs or {}))
    if any(t.is_meta for t in (*found.state().values(), *flat)):
        return found
    kept = (*first.written, *numbers_kept(model, first.twin)) if first else ()
    found = replace(found, notes=(*found.notes, *kept))
    if check:
        found = _tied(found, model, flat)
    beside = Beside(found, model, first)
    with silent():
        if check:
            return _checked(beside, flat)
        _refuse(beside, flat)
        return follow_training(found, model, args, dict(kwargs or {}))


def _tied(found: Trace, model: nn.Module, flat: Sequence[torch.Tensor]) -> Trace:
    def runs(inputs: Sequence[torch.Tensor]) -> bool:
        with spare(model) as twin:
            return call(twin, found, inputs) is not None

    with silent():
        guards = tied(found.signature.guards, flat, runs)
    return replace(found, signature=replace(found.signature, guards=guards))


@dataclass(frozen=True)
class First:
    """A spare after its first call, on the example and in evaluation mode, what it answered, and a
    remark on the inputs that it wrote to.
    """

    twin: nn.Module
    answer: object
    written: tuple[str, ...] = ()


def _first(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> First | None:
    """Call a spare before anything is traced; None where that fails.

    What a forward keeps outside of its module (functools.lru_cache, a global) is the user's own: it
    has to be kept of a real call, since what is kept of a trace is no tensor for any later call.
    """
    given = pytree.tree_map(as_tensor, (tuple(args), dict(kwargs)))
    leaves = (*tensors_of(model).values(), *pytree.tree_leaves(given))
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
        return None
    with torch.no_grad(), spare(model) as twin:
        own, named = copied_inputs(*given)
        inputs = named_args(model, own) | named
        before = dict(tensor_names(inputs))
        try:
            found = answer_to(twin, own, named)
            said = pytree.tree_map_only(torch.Tensor, copied_tensor, found)
        except Exception:  # noqa: BLE001  the user's forward may raise anything
            return None
    refuse_new_parameters(model, twin)
    refuse_filled(inputs)
    return First(twin, said, inputs_set(before, inputs))


def _checked(beside: Beside, flat: Sequence[torch.Tensor]) -> Trace:
    found, model = beside.trace, beside.model
    quickly = _quickly(beside, flat) if has_one_mode(found.graph) else ""
    if isinstance(quickly, Trace):
        return quickly
    if note := _fast_path(beside, flat):
        with plain_attention():
            found = _looked_at(found, model, flat, quickly)
        return replace(found, notes=(*found.notes, note))
    return _looked_at(found, model, flat, quickly)


def _fast_path(beside: Beside, flat: Sequence[torch.Tensor]) -> str:
    """Say where a model takes another path without gradients, which torch's encoder layers do;
    refuse any other that does.
    """
    if beside.agree(flat, beside.first) is not False:
        return ""
    with plain_attention():
        if beside.agree(flat) is not False:
            return FAST_PATH
    evaluated = compared(beside.trace, beside.model, flat, training=False)
    if evaluated is None or evaluated.found is None or evaluated.difference(beside.tolerance):
        return ""  # it differs with gradients, too
    raise TraceError(
        "under torch.no_grad() the forward computes something else on the example than with "
        f"gradients (relative error {beside.error(flat):.1e}), and a trace holds one of the two. "
        "Expected a forward that computes the same: take out what asks for requires_grad, grad_fn "
        "or torch.is_grad_enabled()."
    )


def _looked_at(
    found: Trace, model: nn.Module, flat: Sequence[torch.Tensor], elsewhere: str
) -> Trace:
    """Compare graph and model on the example and at other sizes, mode by mode; `elsewhere` is what
    is other in training mode at other sizes.
    """
    evaluated = compared(found, model, flat, training=False)
    _refuse(Beside(found, model), flat, evaluated)
    if evaluated is not None:
        refuse_other_path(found, model, flat, evaluated.expected.state)
    refuse_memory(found, model, flat)
    found, training = trained(found, model, flat, evaluated)
    beside = Beside(found, model)
    found = _settled(found, flat, beside)
    if why := _difference(beside, flat, evaluated, training=False):
        return without_gradients(found, why)
    if any("training mode" in note for note in found.notes):
        return found
    if why := _difference(beside, flat, training, training=True) or elsewhere:
        return without_training(found, f"{why}, as of a branch on self.training")
    why = _memory(found, model, flat, training)
    return without_training(found, why) if why else found


def _quickly(beside: Beside, flat: Sequence[torch.Tensor]) -> Trace | str:
    """Return a checked trace of one mode after three forwards; where there is more to see, what is
    other in training mode at other sizes ("": nothing).

    Such a graph was compared with the model on the example as it is used, in evaluation mode and
    without gradients. It is compared at size 1, in the next call of the `twin` that computed the
    example, and in training mode with gradients at other sizes.
    """
    found, model = beside.trace, beside.model
    trials = trials_of(found.signature.guards, flat)
    if trials is None:
        return ""
    other, one = trials
    if not beside.agree_twice(flat, one):
        return ""
    followed, pair = trained(found, model, other, None)
    why = _difference(beside, other, pair, training=True)
    if pair is None or why or _memory(found, model, other, pair):
        return why
    refuse_other_path(found, model, other, pair.expected.state)
    guards = from_one(found.signature.guards)
    return replace(followed, signature=replace(found.signature, guards=guards))


def _memory(
    found: Trace, model: nn.Module, flat: Sequence[torch.Tensor], training: Pair | None
) -> str:
    if training is None or not training.expected.kept:
        return ""
    return memory(found, model, flat, training=True)


def _difference(
    beside: Beside, flat: Sequence[torch.Tensor], pair: Pair | None, *, training: bool
) -> str:
    """Return "" where graph and model agree; what float32 rounds away is seen in float64."""
    why = pair.difference(beside.tolerance) if pair is not None else ""
    if not why or beside.tolerance != TOLERANCE[torch.float32]:
        return why
    with beside.doubled(flat) as (wide, inputs):
        again = compared(wide.trace, wide.model, inputs, training=training)
        return "" if again is not None and not again.difference(wide.tolerance) else why


def _refuse(beside: Beside, flat: Sequence[torch.Tensor], evaluated: Pair | None = None) -> None:
    """Refuse a graph of other values; `evaluated` are its values where they are known."""
    tolerance = beside.tolerance
    if evaluated is None or evaluated.found is None or evaluated.expected.dropped:
        error = beside.error(flat)
    else:
        error = evaluated.error()
    if not error <= tolerance and not beside.is_rounding(flat):
        raise OtherValues(
            "the traced graph does not compute what the model computes on the example inputs "
            f"(relative error {error:.1e}; at most {tolerance:g} expected). Some forwards take "
            "another path while they are traced (torch.compiler.is_exporting, a kernel that is "
            "chosen by the values of a mask), or draw random numbers that are not torch's. Turn "
            "that path off, or give the inputs it makes for itself (masks, position ids) yourself."
        )


@dataclass(frozen=True)
class Beside:
    """A traced graph beside its model, in evaluation mode; `first` is the model's first call."""

    trace: Trace
    model: nn.Module
    first: First | None = None

    @property
    def tolerance(self) -> float:
        """The relative error that the least precise of the model's types deserves."""
        types = {t.dtype for t in self.trace.state().values()} & TOLERANCE.keys()
        return max((TOLERANCE[t] for t in types), default=TOLERANCE[torch.float32])

    def error(self, flat: Sequence[torch.Tensor]) -> float:
        """Return the relative error of the graph on the example, both with the same random
        numbers; raises what the model raises.
        """
        return self._against(self.first.answer if self.first else self._of_model(flat), flat)

    def agree(self, flat: Sequence[torch.Tensor], first: First | None = None) -> bool | None:
        """Tell whether graph and model agree; None where the model itself fails.

        Args:
            flat: the flat tensors of a call.
            first: the model's answer to it, where it is known.
        """
        try:
            expected = first.answer if first else self._of_model(flat)
        except Exception:  # noqa: BLE001  the user's forward may raise anything
            return None
        try:
            return self._near(expected, flat) or self.is_rounding(flat)
        except (RuntimeError, ValueError, IndexError):
            return False

    def agree_twice(self, flat: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
        """Tell whether graph and model agree on the example and, in the second call of the same
        spare, on other sizes: what the first call leaves to the second shows. Rounding is no
        excuse.
        """
        if self.first is None or not self._near(self.first.answer, flat):
            return False
        try:
            with torch.no_grad(), chance_kept():
                expected = answer(self.first.twin, *self.trace.signature.call(other))
        except Exception:  # noqa: BLE001  the user's forward may raise anything
            return False
        return self._near(expected, other)

    def _near(self, expected: object, flat: Sequence[torch.Tensor]) -> bool:
        try:
            return self._against(expected, flat) <= self.tolerance
        except (RuntimeError, ValueError, IndexError):
            return False

    @contextlib.contextmanager
    def doubled(self, flat: Sequence[torch.Tensor]) -> Generator[tuple[Beside, list[torch.Tensor]]]:
        """Yield graph, model and inputs in float64, in memory of their own."""
        with spare(self.model) as twin, spare(self.trace.root) as root:
            wide = Beside(replace(self.trace, root=root.double()), twin.double())
            yield wide, [t.double() if t.is_floating_point() else t for t in flat]

    def is_rounding(self, flat: Sequence[torch.Tensor]) -> bool:
        """Tell whether graph and model of float32 are one in float64."""
        if self.tolerance != TOLERANCE[torch.float32]:
            return False
        with self.doubled(flat) as (wide, inputs):
            return wide.agree(inputs) is True

    def _of_model(self, flat: Sequence[torch.Tensor]) -> object:
        with torch.no_grad(), spare(self.model) as twin:
            return answer(twin, *self.trace.signature.call(flat))

    def _against(self, expected: object, flat: Sequence[torch.Tensor]) -> float:
        root = self.trace.root
        with torch.no_grad(), chance_kept(), modes_kept(root):
            root.training = False
            seed_torch(0)
            found = fx.Interpreter(root, graph=self.trace.graph).run(*flat)
        return relative_error(self.trace.signature.unflatten(found), expected)


def _settled(found: Trace, flat: Sequence[torch.Tensor], beside: Beside) -> Trace:
    before = found.signature.guards
    guards = settled(before, flat, beside.agree)
    new = [g for g in guards.conditions if g.fixes and g not in before.conditions]
    notes = tuple(f"other sizes are refused: {guards.text(g)}, {g.source}" for g in new)
    signature = replace(found.signature, guards=guards)
    return replace(found, signature=signature, notes=(*found.notes, *notes))
