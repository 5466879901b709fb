"""slices(): sub-models of several sizes whose weights are held once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from matryoshkafy.dolls.cuts import Cut, cuts_of, kinds_of
from matryoshkafy.dolls.slice import assemble, parts_of, state_of
from matryoshkafy.dolls.slice import slice as cut_model


def slices(model: nn.Module, sizes: Iterable[float] | None = None) -> dict[int, fx.GraphModule]:
    """Return {size: sub-model}, ascending, whose weights are views of the largest one's.

    A server of several sizes holds the memory of the largest. What is no single run of rows and
    columns of it (the heads of a packed projection, a concatenation), or is another value at each
    size (weight normalisation), is a copy. Train one, and you train them all.

    Args:
        model: a doll or a sub-model.
        sizes: some of its sizes; None: all of them.

    Raises:
        PlanError: for a size that the model has not.
    """
    _, plan = parts_of(model)
    wanted = sorted({plan.level(size) for size in (plan.sizes if sizes is None else sizes)})
    if not wanted:
        return {}
    largest = cut_model(model, plan.sizes[wanted[-1]])
    smaller = {plan.sizes[level]: _smaller(largest, level) for level in wanted[:-1]}
    return {**smaller, plan.sizes[wanted[-1]]: largest}


def _smaller(largest: fx.GraphModule, level: int) -> fx.GraphModule:
    trace, plan = parts_of(largest)
    state = state_of(largest)
    # The same values as a slice of it has; those that can be are views instead of copies.
    copies = state_of(cut_model(largest, plan.sizes[level]))
    made: dict[int, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for cut in cuts_of(plan, level):
        copy = copies[cut.name]
        if id(copy) not in made:
            made[id(copy)] = _view(state, cut, copy)
        tensors[cut.name] = made[id(copy)]
    return assemble(trace, plan.up_to(level), tensors, kinds_of(state))


def _view(state: Mapping[str, torch.Tensor], cut: Cut, copy: torch.Tensor) -> torch.Tensor:
    view = state[cut.name].detach()
    if view.layout is not torch.strided or any(len(s) != 1 for s in cut.segments if s is not None):
        return copy.detach()
    for dim, segments in enumerate(cut.segments):
        if segments is not None:
            view = view.narrow(dim, segments[0][0], segments[0][1] - segments[0][0])
    return view if torch.equal(view, copy) else copy.detach()
