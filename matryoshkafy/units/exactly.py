"""A group turned exactly: gains folded into their readers, every tensor into the new basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import flat_inputs, run_graph
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.bases import mean_kept, principal, turn
from matryoshkafy.units.states import Survey
from matryoshkafy.units.turning import GroupBasis, energy_of, turned_back

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Turned:
    """A group in a new basis: its row, the matrix [n, n], how far the full model moved."""

    row: GroupBasis
    basis: Tensor
    error: float


def turned_exactly(
    doll: Doll, plan: Plan, seen: Survey, batch: object, moment: Callable[[], Tensor]
) -> Turned | str:
    """Turn a group in place; return what was done, or why it was put back as it had been.

    plan: of the group's dims; moment: measures [n, n] the second moment after the gains are folded.
    """
    g = seen.group
    probe = flat_inputs(doll, batch)
    kept = _copies(doll, plan, seen)
    before = run_graph(doll, trace_of(doll).graph, probe)
    fold(doll, seen)
    found = moment()
    widths = [w[g] for w in plan.ladder]
    basis = mean_kept(found, widths) if seen.mean else principal(found)
    turn(trace_of(doll).state(), plan, {g: basis}, seen.scales)
    after = turned_back(doll, {g: basis}, run_graph(doll, trace_of(doll).graph, probe), plan)
    error = relative_error(after, before)
    if not error <= TOLERANCE:
        _restore(doll, kept)
        return f"the full model moves by {error:.0e}"
    group, energy = plan.groups[g], energy_of(found, basis, widths)
    folded = (*seen.gains, *seen.written)
    return Turned(GroupBasis(group.name, group.size, folded, seen.mean, energy), basis, error)


def _copies(doll: Doll, plan: Plan, seen: Survey) -> dict[str, Tensor]:
    """Return copies of every tensor that folding and turning a group changes."""
    names = {n for readers in seen.readers.values() for n, _ in readers} | set(seen.gains)
    carrying = {
        name
        for name, shape in plan.parameters.items()
        if any(seen.group in dims.groups_of(d) for d in shape)
    }
    state = trace_of(doll).state()
    return {n: state[n].detach().clone() for n in names | carrying if n in state}


def _restore(doll: Doll, copies: Mapping[str, Tensor]) -> None:
    state = trace_of(doll).state()
    for name, tensor in copies.items():
        state[name].data.copy_(tensor)


def fold(doll: Doll, seen: Survey) -> None:
    """g n + b read by W becomes n + b / g read by W diag(g), g (W x + b) what diag(g) W writes:
    gains become ones, biases stay.
    """
    state = trace_of(doll).state()
    _fold_before(state, seen)
    done: set[int] = set()
    for name, gained in seen.gains.items():
        gain = state[name].detach().to(torch.float64) + gained.offset
        for weight, dim in seen.readers.get(name, ()):
            tensor = state[weight]
            if id(tensor) not in done:
                done.add(id(tensor))
                _scale(tensor, gain, dim)
        if gained.bias:
            # A unit of no gain has no bias either, or the survey would have refused.
            _scale(state[gained.bias], torch.where(gain == 0, 0.0, 1 / gain), 0)
        state[name].data.fill_(1.0 - gained.offset)


def _fold_before(state: Mapping[str, Tensor], seen: Survey) -> None:
    for name, (offset, writers) in seen.written.items():
        gain = state[name].detach().to(torch.float64) + offset
        for one in writers:
            _scale(state[one.weight], gain, one.dim)
            if one.bias:
                _scale(state[one.bias], gain, 0)
        state[name].data.fill_(1.0 - offset)


def _scale(tensor: Tensor, factors: Tensor, dim: int) -> None:
    shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
    wide = tensor.data.to(torch.float64) * factors.view(shape)
    tensor.data.copy_(wide)
