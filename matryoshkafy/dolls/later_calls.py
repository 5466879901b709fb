"""Later calls of a model: a graph is the first call, which may leave something to the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.measure import relative_error
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.capture import SPECIALISED
from matryoshkafy.graph.copies import copied_inputs, reseed_others, seed_torch, spare, untouched
from matryoshkafy.graph.quiet import modes_kept
from matryoshkafy.graph.signature import tensor_names
from matryoshkafy.graph.trace import Trace, tensors_of, trace

State = Mapping[str, Tensor]
COUNTED = (int, float, str)
HOLDING = (list, tuple, dict, set, deque)
# One code on the same inputs: kernels may add up in another order, no more.
ALIKE = 1e-6


def refuse_other_path(found: Trace, model: nn.Module, flat: Sequence[Tensor], after: State) -> None:
    """Refuse the path of a call that makes a model ready: its next call takes another.

    Args:
        found: the trace of the first call.
        model: the user's.
        flat: the flat tensors of a call.
        after: the tensors of a spare after its first call.
    """
    own = tensors_of(model)
    touched = [n for n, t in after.items() if n in own and not untouched(t, own[n])]
    written = [n for n in touched if not torch.equal(after[n], own[n])]
    if not written:
        return
    with spare(model) as twin:
        call(twin, found, flat)
        again = trace(twin, *found.signature.call(flat))
    same = [n.target for n in again.graph.nodes] == [n.target for n in found.graph.nodes]
    if same or not _counts(found, model, flat):
        return
    branch = next((n for n in found.notes if n.startswith(SPECIALISED)), "").partition(";")[0]
    where = f" ({branch.removeprefix(SPECIALISED)})" if branch else ""
    raise TraceError(
        f"the forward writes into {written[0]!r}, and its next call takes another path than its "
        f"first, which was traced{where}. Expected a model that is ready: call it once "
        "(model(*inputs)), then convert it."
    )


def refuse_memory(found: Trace, model: nn.Module, flat: Sequence[Tensor]) -> None:
    """Refuse a forward whose next call in evaluation mode is another; see `memory`."""
    if why := memory(found, model, flat, training=False):
        raise TraceError(
            f"{why}; a trace is one call. Where the first call makes the model ready, call it once "
            "(model(*inputs)), then convert it; what should change from call to call belongs in a "
            "buffer (register_buffer), or among inputs and outputs."
        )


def memory(found: Trace, model: nn.Module, flat: Sequence[Tensor], *, training: bool) -> str:
    """Say what a forward keeps of a call elsewhere than in a parameter or buffer, and computes
    something else with in its next call; "" where it does not.

    Args:
        found: the trace of the first call.
        model: the user's.
        flat: the flat tensors of the example.
        training: the mode.
    """
    for other in _others(flat):
        later = _later(found, model, (flat, other), training)
        if later is None:
            return ""
        first = _fresh(found, model, later.written, other, training)
        if not (_is_finite(later.answer) and _is_finite(first)):
            continue
        error = relative_error(later.answer, first)
        if error <= ALIKE:
            return ""
        # What two first calls do not agree on is chance.
        chance = relative_error(_fresh(found, model, later.written, other, training), first)
        if error <= 10 * chance:
            return ""
        where = f" (in {', '.join(map(repr, later.made))})" if later.made else ""
        return (
            f"the forward keeps something of a call{where}, and its next call computes something "
            f"else with it (relative error {error:.1e})"
        )
    return ""


def _counts(found: Trace, model: nn.Module, flat: Sequence[Tensor]) -> bool:
    """Tell whether a second call computes something else than a first: a table that the first call
    fills with the same numbers whatever it is given makes no difference.
    """
    for other in _others(flat):
        later = _later(found, model, (flat, other), training=False)
        first = _fresh(found, model, {}, other, training=False)
        if later is not None and _is_finite(later.answer) and _is_finite(first):
            return relative_error(later.answer, first) > ALIKE
    return True


@dataclass(frozen=True)
class _Later:
    """What a second call computed, what the first wrote, and the attributes that it made."""

    answer: object
    written: State
    made: tuple[str, ...]


def _later(
    found: Trace, model: nn.Module, calls: tuple[Sequence[Tensor], Sequence[Tensor]], training: bool
) -> _Later | None:
    """Call one spare twice; None where the first call fails."""
    own, (first, second) = tensors_of(model), calls
    with spare(model) as twin:
        if call(twin, found, first, training=training) is None:
            return None
        after = {n: t for n, t in tensors_of(twin).items() if n in own}
        written = {n: t.detach().clone() for n, t in after.items() if not untouched(t, own[n])}
        kept = tuple(made(model, twin))
        return _Later(call(twin, found, second, training=training), written, kept)


def refuse_new_parameters(model: nn.Module, twin: nn.Module) -> None:
    """Refuse a forward whose first call makes parameters: a trace would draw them at every call.

    Args:
        model: the user's.
        twin: a spare of it after its first call.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    new = [n for n, _ in twin.named_parameters(remove_duplicate=False) if n not in own]
    if new:
        raise TraceError(
            f"the first call of the forward makes parameters ({', '.join(map(repr, new[:3]))}). "
            "Expected a model that is ready: call it once (model(*inputs)), then convert it."
        )


def inputs_set(before: Mapping[str, Tensor], inputs: Mapping[str, object]) -> tuple[str, ...]:
    """Return a remark on an entry that a call set in its inputs: a doll leaves them as they are.

    Args:
        before: the tensors of the inputs before the call, by name.
        inputs: the inputs after it.
    """
    after = dict(tensor_names(inputs))
    changed = [n for n in {**after, **before} if after.get(n) is not before.get(n)]
    if not changed:
        return ()
    return (f"a call sets its input {changed[0]}, which the doll leaves as it is",)


def numbers_kept(before: nn.Module, after: nn.Module) -> tuple[str, ...]:
    """Return a remark on the plain attributes that count calls, or hold more after one; a few
    calls do not show what a later one makes of them.

    Args:
        before: the user's model.
        after: a spare of it after its first call.
    """
    names = [repr(name) for name in _changed(before, after)]
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"a call changes {', '.join(names[:3])}{more}, which is neither parameter nor buffer: the "
        "graph is the first call, and a later one that computes something else with it is another",
    )


def call(
    twin: nn.Module, found: Trace, flat: Sequence[Tensor], *, training: bool = False
) -> object:
    """Call a spare without gradients, and leave its modes; None where it fails."""
    with torch.no_grad(), modes_kept(twin):
        try:
            return answer(twin, *found.signature.call(flat), training=training)
        except Exception:  # noqa: BLE001  the user's forward may raise anything
            return None


def answer(
    twin: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], *, training: bool = False
) -> object:
    """Return what a spare answers in a mode, with inputs and random numbers of its own."""
    return answer_to(twin, *copied_inputs(args, kwargs), training=training)


def answer_to(
    twin: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], *, training: bool = False
) -> object:
    """Return what a spare answers to inputs that it may write into."""
    if not training:
        twin.eval()
    elif not twin.training:
        twin.train()
    seed_torch(0)
    reseed_others(0)  # what they drew while it was traced is a constant of the graph
    return twin(*args, **kwargs)


def _fresh(
    found: Trace, model: nn.Module, written: State, flat: Sequence[Tensor], training: bool
) -> object:
    """Return what a spare computes in its first call, given what another's call wrote."""
    with spare(model) as twin:
        for name, tensor in tensors_of(twin).items():
            if name in written and written[name].shape == tensor.shape:
                tensor.data.copy_(written[name])
        return call(twin, found, flat, training=training)


def _others(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield other values of the same sizes: the first row or column everywhere, larger floats.

    A sparse tensor stays as it is: its places are a graph.
    """
    for dim in (0, 1):
        other = [_other(t, dim) for t in flat]
        pairs = zip(flat, other, strict=True)
        if any(a is not b and not torch.equal(a, b) for a, b in pairs):
            yield other


def _other(value: Tensor, dim: int) -> Tensor:
    if value.layout != torch.strided:
        return value
    spread = value.dim() > dim and value.numel()
    first = value.narrow(dim, 0, 1).expand_as(value) if spread else value
    return first * 1.5 if value.is_floating_point() else first


def _is_finite(answer: object) -> bool:
    leaves = [v for v in pytree.tree_leaves(answer) if isinstance(v, Tensor)]
    return bool(leaves) and all(bool(v.isfinite().all()) for v in leaves)


def made(before: nn.Module, after: nn.Module) -> Iterator[str]:
    """Yield the names of plain attributes of a spare that its call made or changed, where that is
    a tensor.
    """
    old = dict(_modules(before))
    for path, module in _modules(after):
        held = vars(old[path]) if path in old else {}
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not _is_as_before(value, held.get(name)):
                yield f"{path}.{name}".lstrip(".")


def _changed(before: nn.Module, after: nn.Module) -> Iterator[str]:
    """Yield the names of plain numbers, words and collections of a spare that its call changed."""
    old = dict(_modules(before))
    for path, module in _modules(after):
        held = vars(old[path]) if path in old else vars(module)
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and _moved(held.get(name), value):
                yield f"{path}.{name}".lstrip(".")


def _moved(before: object, after: object) -> bool:
    if isinstance(after, COUNTED):
        return type(before) is not type(after) or before != after
    if isinstance(after, HOLDING):
        return not isinstance(before, Sized) or len(before) != len(cast("Sized", after))
    return False


def _modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return cast("Iterable[tuple[str, nn.Module]]", model.named_modules())


def _is_as_before(value: Tensor, before: object) -> bool:
    if not isinstance(before, Tensor) or before.shape != value.shape:
        return False
    return untouched(value, before) or torch.equal(value, before)
