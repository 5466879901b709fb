"""What a doll, or a model cut from one, must say when it is trained or called."""

# torch has no public name for what tells whether a transform is at work.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.capture import SPECIALISED
from matryoshkafy.graph.casts import ONE_TYPE
from matryoshkafy.graph.paths import CHECKED
from matryoshkafy.graph.trace import NO_GRADIENTS, NO_TRAINING
from matryoshkafy.plan.plan import Plan

FUNCTORCH = cast("Any", torch._C)._functorch
DIFFERENTIATES = (FUNCTORCH.TransformType.Grad, FUNCTORCH.TransformType.Jvp)


class RecordedPathWarning(UserWarning):
    """A model was recorded along the path of its example inputs; other values may take another."""


def why_untrained(plan: Plan) -> str:
    """Return the remark that says why a model does not train as the user's does, "" if it does."""
    reasons = (NO_GRADIENTS, NO_TRAINING)
    return next((note for note in plan.remarks if note.startswith(reasons)), "")


def refuse_training(plan: Plan, what: str) -> None:
    """Raise `TraceError` where the graph does not train as the user's model does."""
    if reason := why_untrained(plan):
        raise TraceError(
            f"this {what} cannot be trained; {reason}. Train the model that it was converted "
            "from, and convert the result; or rewrite that part with torch operations."
        )


class OtherTypeWarning(UserWarning):
    """A model asks for the type of its values, and computes in another than it was traced in."""


def refuse_transform(plan: Plan) -> None:
    """Raise `TraceError` where torch.func differentiates a masked doll, whose operators know
    autograd's own derivatives alone.
    """
    if not plan.masked or torch.compiler.is_compiling():
        return
    if any(level.key() in DIFFERENTIATES for level in FUNCTORCH.get_interpreter_stack() or ()):
        raise TraceError(
            "torch.func was asked to differentiate a doll in masked nesting. Expected autograd "
            "(loss.backward(), torch.autograd.grad), a slice (mk.slice(doll, size)), or a doll "
            'that was converted with nesting="sliced".'
        )


class Caveats:
    """Warns once, at the first call that they concern, of what a model computes otherwise."""

    def __init__(self, plan: Plan) -> None:
        note = next((note for note in plan.remarks if note.startswith(SPECIALISED)), "")
        # Where what it read is checked, a call of another path is refused.
        self.path = "" if CHECKED in note else note.removeprefix(SPECIALISED).partition(";")[0]
        self.types = [note for note in plan.remarks if note.startswith(ONE_TYPE)]

    def __bool__(self) -> bool:
        return bool(self.path or self.types)

    def __call__(self, module: nn.Module, *call: object) -> None:
        """Speak, the first time; also as a hook before a forward."""
        del call
        if not self or torch.compiler.is_compiling():
            return
        if self.path:
            reason, self.path = self.path, ""
            warnings.warn(
                f"{reason}, and the path of the example inputs was recorded: inputs of other "
                "values get the answer of that path. Convert with an example that takes the path "
                "you need, or rewrite that line with operations of one path (torch.where, masks).",
                RecordedPathWarning,
                stacklevel=3,
            )
        if self.types and not _has_type(module, self.types[0]):
            said, self.types = self.types, []
            warnings.warn(
                f"this model was cast, and {'; '.join(said)}: another type may get another answer. "
                "Cast the model before it is converted.",
                OtherTypeWarning,
                stacklevel=3,
            )


def _has_type(module: nn.Module, note: str) -> bool:
    """Tell whether a parameter has the type that a remark names."""
    name = note.removeprefix(ONE_TYPE).partition(",")[0]
    return any(str(p.dtype) == f"torch.{name}" for p in module.parameters())
