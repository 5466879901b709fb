"""traced(): a trace that was compared with the model, at the example's sizes and at others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from matryoshkafy.dolls.gradients import follow_gradients
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.copies import chance_kept, copied_inputs, reseed_others, seed_torch, spare
from matryoshkafy.graph.quiet import modes_kept, silent
from matryoshkafy.graph.trace import Trace, trace
from matryoshkafy.graph.training_mode import follow_training
from matryoshkafy.graph.trials import settled

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
    found = trace(model, args, kwargs)
    flat = found.signature.flatten(args, dict(kwargs or {}))
    if any(t.is_meta for t in (*found.state().values(), *flat)):
        return found
    with silent():
        beside = Beside(found, model)
        _refuse(beside.error(flat), beside.tolerance)
        found = follow_training(found, model, args, dict(kwargs or {}))
        if not check:
            return found
        found = _settled(found, flat, beside)
        return follow_gradients(found, model, flat, beside.tolerance)


def _refuse(error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise TraceError(
            "the traced graph does not compute what the model computes on the example inputs "
            f"(relative error {error:.1e}; at most {tolerance:g} expected). Some forwards take "
            "another path while they are traced (torch.compiler.is_exporting, a kernel that is "
            "chosen by the values of a mask), or draw random numbers that are not torch's. Turn "
            "that path off, or give the inputs it makes for itself (masks, position ids) yourself."
        )


@dataclass(frozen=True)
class Beside:
    """A traced graph beside its model, in evaluation mode."""

    trace: Trace
    model: nn.Module

    @property
    def tolerance(self) -> float:
        """The relative error that the least precise of the model's types deserves."""
        types = {t.dtype for t in self.trace.state().values()} & TOLERANCE.keys()
        return max((TOLERANCE[t] for t in types), default=TOLERANCE[torch.float32])

    def error(self, flat: Sequence[torch.Tensor]) -> float:
        """Return the relative error of the graph, both with the same random numbers; raises what
        the model raises.
        """
        return self._against(self._of_model(flat), flat)

    def agree(self, flat: Sequence[torch.Tensor]) -> bool | None:
        """Tell whether graph and model agree; None where the model itself fails."""
        try:
            expected = self._of_model(flat)
        except Exception:  # noqa: BLE001  the user's forward may raise anything
            return None
        try:
            return self._against(expected, flat) <= self.tolerance
        except (RuntimeError, ValueError, IndexError):
            return False

    def _of_model(self, flat: Sequence[torch.Tensor]) -> object:
        args, kwargs = copied_inputs(*self.trace.signature.call(flat))
        with torch.no_grad(), spare(self.model) as twin:
            seed_torch(0)
            reseed_others(0)  # what they drew while it was traced is a constant of the graph
            return twin.eval()(*args, **kwargs)

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
