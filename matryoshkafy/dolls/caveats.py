"""What a doll, or a model cut from one, must say when it is trained or called."""

from __future__ import annotations

import warnings

import torch

from matryoshkafy.errors import TraceError
from matryoshkafy.graph.capture import SPECIALISED
from matryoshkafy.graph.trace import NO_GRADIENTS, NO_TRAINING
from matryoshkafy.plan.plan import Plan


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


class Recorded:
    """Warns once, at the first call, if the path of a model was chosen by values of the example."""

    def __init__(self, plan: Plan) -> None:
        note = next((note for note in plan.remarks if note.startswith(SPECIALISED)), "")
        self.text = note.removeprefix(SPECIALISED).partition(";")[0]

    def __call__(self, *call: object) -> None:
        """Speak, the first time; also as a hook before a forward."""
        del call
        if not self.text or torch.compiler.is_compiling():
            return
        reason, self.text = self.text, ""
        warnings.warn(
            f"{reason}, and the path of the example inputs was recorded: inputs of other values "
            "get the answer of that path. Convert with an example that takes the path you need, "
            "or rewrite that line with operations of one path (torch.where, masks).",
            RecordedPathWarning,
            stacklevel=3,
        )
