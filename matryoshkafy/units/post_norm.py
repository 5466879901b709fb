"""Post-norm streams turned in their own class: outlier units kept, diagonal gains for the rest.

A gain g on the stream becomes Q diag(g) Q' when the stream is turned by Q. The class holds a
diagonal alone: row i of it is the mean of the old gains weighted by Q[i]^2. Few units carry most of
a gain's deviation; they stay units, so that what the diagonal leaves out is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from matryoshkafy.dolls.batches import flat_inputs, run_graph
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.bases import outliers_kept, turn
from matryoshkafy.units.survey import Survey, survey
from matryoshkafy.units.turning import GroupBasis, energy_of, moment_of, turned_back


def post_survey(doll: Doll, group: int) -> Survey | None:
    """Return the survey of a stream that only gains on it keep from being turned, or None."""
    trace = doll._trace
    found = survey(trace.graph, doll.plan, trace.state(), group, post=True)
    turns = not found.obstacles and found.contracted and found.diagonal
    return found if turns and doll.plan.groups[group].size > 2 else None


def turned_post_norm(
    doll: Doll, batches: Sequence[Any], group: int, seen: Survey, outliers: int
) -> tuple[GroupBasis, Tensor, float]:
    """Turn a post-norm stream in place; return its row, its basis, and how far the model moved."""
    probe = flat_inputs(doll, batches[0])
    before = run_graph(doll, doll._trace.graph, probe)
    state, size = doll._trace.state(), doll.plan.groups[group].size
    widths = [w[group] for w in doll.plan.ladder]
    moment = moment_of(doll, batches, group)
    gains = {name: state[name].detach().double() + o for name, o in seen.diagonal.items()}
    kept = outlier_units(gains, min(outliers, widths[0] // 2, size - 2))
    basis = outliers_kept(moment, widths, kept, mean=seen.mean)
    turn(state, doll.plan, {group: basis}, seen.scales)
    for name, gain in gains.items():
        state[name].data.copy_(basis.square() @ gain - seen.diagonal[name])
    after = turned_back(doll, {group: basis}, run_graph(doll, doll._trace.graph, probe))
    energy = energy_of(moment, basis, widths)
    name = doll.plan.groups[group].name
    row = GroupBasis(name, size, tuple(gains), seen.mean, energy)
    return row, basis, relative_error(after, before)


def outlier_units(gains: Mapping[str, Tensor], count: int) -> Tensor:
    """Return the units whose gains lie farthest from the median, over all norms, as indices."""
    score = sum(((g - g.median()) / g.median()).square() for g in gains.values())
    assert isinstance(score, Tensor)
    return score.argsort(descending=True, stable=True)[:count]
