"""Trained weights: sliced nesting keeps what they compute, masked nesting does not and says so."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from matryoshkafy.dolls.calls import Call
from matryoshkafy.dolls.doll import Doll, replan, root_of
from matryoshkafy.dolls.libraries import (
    caches_off,
    has_spikes,
    loaded_by,
    trained_norm,
    was_loaded,
)
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.graph.copies import chance_kept, copied_inputs, seed_torch, spare
from matryoshkafy.graph.quiet import modes_kept
from matryoshkafy.plan.plan import Plan


class PretrainedWarning(UserWarning):
    """A model with trained weights is converted so that it computes something else."""


def nesting_of(nesting: str | None, scope: str, model: nn.Module) -> tuple[str, str]:
    """Return the nesting, and why it was chosen where no one asked for it.

    Args:
        nesting: what the person asked for, or None.
        scope: "full", "ffn" or "output".
        model: the user's model: weights that a library loaded keep their function.
    """
    if nesting is not None or scope == "output":
        return nesting or "masked", ""
    reason = loaded_by(model)
    if scope == "ffn" or reason is None:
        return ("sliced" if scope == "ffn" else "masked"), ""
    return "sliced", (
        f'nesting="sliced" was chosen: {reason}, and sliced nesting keeps what they compute; give '
        'nesting="masked" to train every size in one pass'
    )


def remarked(plan: Plan, remark: str) -> Plan:
    """Return the plan with one more remark, if there is one."""
    return replace(plan, remarks=(*plan.remarks, remark)) if remark else plan


def say_how_far_off(doll: Doll, call: Call) -> None:
    """Warn where masked nesting changes what trained weights compute, and by how much.

    The remark stands in the doll's plan, and so in its checkpoints.
    """
    if not doll.plan.masked or doll.plan.options.scope == "output":
        return
    if any(p.is_meta for p in doll.parameters()) or not _is_trained(call.model):
        return
    error = distance(doll, call)
    if error <= 1e-3:
        return
    text = (
        "masked nesting on trained weights: at full size the doll is no longer the model "
        f"({error:.0%} off on the example, of its largest output). Convert with "
        'nesting="sliced" to keep what was learned, or fine-tune; weights that were trained in '
        "masked nesting are all right."
    )
    replan(doll, remarked(doll.plan, text))
    warnings.warn(text, PretrainedWarning, stacklevel=3)


def _is_trained(model: nn.Module) -> bool:
    """Tell whether weights were read from a checkpoint, or look as only training leaves them: gains
    of norms drawn at random are no proof.
    """
    return was_loaded(model) or (trained_norm(model) is not None and has_spikes(model))


def distance(doll: Doll, call: Call) -> float:
    """Return how far a doll at full size is from the model on a call, relative to the largest
    output, both in evaluation mode.
    """
    args, kwargs = copied_inputs(call.args, call.kwargs)
    with torch.no_grad(), caches_off(call.model), spare(call.model) as twin:
        seed_torch(0)
        expected = twin.eval()(*args, **kwargs)
    with torch.no_grad(), chance_kept(), modes_kept(doll, root_of(doll)):
        seed_torch(0)
        return relative_error(doll.eval()(*call.args, **dict(call.kwargs)), expected)
