"""Post-norm streams turned in their own class: outlier units kept, diagonal gains for the rest.

A gain g on the stream becomes the matrix M = Q diag(g) Q' when the stream is turned by Q. The class
holds a diagonal d and a bias alone: those are taken that come nearest to M n over the calibration
inputs n, d[i] = cov((M n)[i], n[i]) / var(n[i]), and what is missing on average goes into the bias.
Few units carry most of a gain's deviation from one number; they stay units, so that little is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshkafy.axes.dims import Dim
from matryoshkafy.dolls.batches import flat_inputs, run_graph
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.bases import outliers_kept, turn
from matryoshkafy.units.exactly import fold
from matryoshkafy.units.normed import stream
from matryoshkafy.units.states import Survey
from matryoshkafy.units.survey import survey
from matryoshkafy.units.turning import GroupBasis, energy_of, moment_of, turned_back


def post_survey(doll: Doll, group: int) -> Survey | None:
    """Return the survey of a stream that only gains on it keep from being turned, or None."""
    trace = trace_of(doll)
    found = survey(trace.graph, doll.plan, trace.state(), group, post=True)
    turns = not found.obstacles and found.contracted and found.diagonal
    return found if turns and doll.plan.groups[group].size > 2 else None


def turned_post_norm(
    doll: Doll, batches: Sequence[object], group: int, seen: Survey, outliers: int
) -> tuple[GroupBasis, Tensor, float]:
    """Turn a post-norm stream in place; return its row, its basis, and how far the model moved."""
    probe = flat_inputs(doll, batches[0])
    before = run_graph(doll, trace_of(doll).graph, probe)
    state, size = trace_of(doll).state(), doll.plan.groups[group].size
    widths = [w[group] for w in doll.plan.ladder]
    fold(doll, seen)
    moment, spreads = moment_of(doll, batches, group), _Spreads()
    stream(doll, batches, spreads.add)
    gains = {n: state[n].detach().double() + g.offset for n, g in seen.diagonal.items()}
    kept = outlier_units(gains, min(outliers, widths[0] // 2, size - 2))
    basis = outliers_kept(moment, widths, kept, mean=seen.mean)
    turn(state, doll.plan, {group: basis}, seen.scales)
    for name, gain in gains.items():
        found = nearest(basis, gain, spreads.of(name, size))
        one = seen.diagonal[name]
        state[name].data.copy_(found.gain - one.offset)
        if one.bias:
            state[one.bias].data.add_(found.bias.to(state[one.bias]))
    after = turned_back(doll, {group: basis}, run_graph(doll, trace_of(doll).graph, probe))
    energy = energy_of(moment, basis, widths)
    row = GroupBasis(doll.plan.groups[group].name, size, tuple(gains), seen.mean, energy)
    return row, basis, relative_error(after, before)


def outlier_units(gains: Mapping[str, Tensor], count: int) -> Tensor:
    """Return the units whose gains lie farthest from the median, over all norms, as indices."""
    score = sum(((g - g.median()) / g.median()).square() for g in gains.values())
    assert isinstance(score, Tensor)
    return score.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class Spread:
    """The mean [n] and the covariance [n, n] of what a gain multiplies."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Diagonal:
    """A gain in the new basis, and what is added to the bias."""

    gain: Tensor
    bias: Tensor


def nearest(basis: Tensor, gain: Tensor, spread: Spread) -> Diagonal:
    """Return the diagonal that comes nearest to the turned gain over the inputs."""
    covariance, mean = basis @ spread.covariance @ basis.t(), basis @ spread.mean
    matrix = basis @ (gain[:, None] * basis.t())
    own = covariance.diagonal()
    even = matrix.diagonal()  # what it is where nothing is known of a unit
    known = own > 1e-9 * own.max()
    found = torch.where(known, (matrix @ covariance).diagonal() / own.clamp_min(1e-30), even)
    return Diagonal(found, matrix @ mean - found * mean)


class _Spreads:
    """Adds up rows, their products and their number for each gain."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def add(self, gain: str, dim: Dim, rows: Tensor, centred: bool) -> None:
        del dim, centred
        n = rows.shape[-1]
        zeros = torch.zeros(n).double(), torch.zeros(n, n).double(), 0
        first, second, count = self.sums.get(gain, zeros)
        wide = rows.cpu()
        total = second + (wide.t() @ wide).double()
        self.sums[gain] = first + wide.double().sum(0), total, count + len(rows)

    def of(self, gain: str, size: int) -> Spread:
        """Return the spread behind a norm; where the norm was no op of its own, an even one."""
        if gain not in self.sums:
            return Spread(torch.zeros(size).double(), torch.eye(size).double())
        first, second, count = self.sums[gain]
        mean = first / count
        return Spread(mean, second / count - torch.outer(mean, mean))
