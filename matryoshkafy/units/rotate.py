"""rotate(): the change of basis that each axis allows; the full model's function unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import flat_inputs, run_graph
from matryoshkafy.dolls.doll import Doll, replan, trace_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.bases import mean_kept, principal, turn
from matryoshkafy.units.order import checked, order
from matryoshkafy.units.permute import OrderError, in_tree, inverse, noted, put_back
from matryoshkafy.units.post_norm import post_survey, turned_post_norm
from matryoshkafy.units.report import OrderReport
from matryoshkafy.units.survey import Survey, survey
from matryoshkafy.units.turning import GroupBasis, energy_of, moment_of, turned_back

TOLERANCE = 1e-4
POST_NORM = ("permute", "diagonal")


@dataclass(frozen=True)
class RotateReport:
    """The result of `rotate`.

    `rotated` rows of the groups in a new basis, `bases` their matrices [n, n] by group (new = basis
    @ old), `obstacles` (group, why) of those that were permuted instead, `order` what became of
    these, `error` how far the full model moved on the first batch, `cost` how far it moved for the
    diagonal gains of post-norm streams (0.0 without such).
    """

    sizes: tuple[int, ...]
    rotated: tuple[GroupBasis, ...]
    bases: Mapping[int, Tensor]
    obstacles: tuple[tuple[str, str], ...]
    order: OrderReport
    error: float
    cost: float = 0.0

    def put_back(self, doll: Doll, output: object) -> Any:
        """Return a full-size output of the doll in the old basis and order."""
        return in_tree(partial(turned_back, doll, self.bases), self.order.put_back(doll, output))

    def turn(self, doll: Doll, output: object) -> Any:
        """Return a full-size output of the old model in the doll's basis and order."""
        bases = {g: q.t() for g, q in self.bases.items()}
        turned = in_tree(partial(turned_back, doll, bases), output)
        return in_tree(partial(put_back, doll, inverse(self.order.permutations)), turned)

    def __str__(self) -> str:
        sizes = "  ".join(f"{s:>6}" for s in self.sizes)
        lines = [f"rotated {len(self.rotated)} groups; the full model moved by {self.error:.1e}"]
        if self.cost:
            lines.append(f"of it {self.cost:.1e} by the diagonal gains of post-norm streams")
        if self.rotated:
            lines.append(f"{'energy in the first units':40}  {sizes}")
        for row in self.rotated:
            kept = "  ".join(f"{k:6.3f}" for k in row.kept)
            lines.append(f"{row.name:40}  {kept}")
        lines += [f"{name} is permuted: {why}" for name, why in self.obstacles]
        return "\n".join([*lines, str(self.order)])


def rotate(  # noqa: PLR0913  the public signature
    doll: Doll,
    batches: Iterable[object],
    *,
    by: str = "activation",
    keep: Sequence[str] = (),
    unread: str = "refuse",
    post_norm: str = "permute",
    outliers: int = 24,
) -> RotateReport:
    """Turn the axes of a sliced doll into bases whose first units carry most, in place.

    An axis on which every op commutes with an orthogonal matrix gets its principal directions: the
    residual stream of a pre-norm model, after the gains of its norms were folded into the weights
    that read them (they become ones; the class stays the same). LayerNorm keeps the direction of
    ones. Every other group is permuted, as `order` does, and the report says what stood in the way.
    One rotation serves the whole ladder. The full model computes the same function, in evaluation
    mode: dropout on a rotated stream falls on other units.

    Args:
        doll: a doll in sliced nesting; its parameters, which are the user's, change.
        batches: calibration inputs, as for `order`.
        by: the score of the groups that are permuted.
        keep: patterns of group names that stay as they are.
        unread: as for `order`.
        post_norm: "permute", or "diagonal": a stream on which gains of norms stand (BERT) is turned
            too, and each gain becomes the diagonal of what the rotation makes of it. The class
            stays the same, the full model does not compute quite the same: the report says how far
            it moved. A short distillation brings it back.
        outliers: with "diagonal", how many units whose gains stand out stay units, in front.

    Returns:
        The report, which prints as a table.

    Raises:
        OrderError: as for `order`; a word for `post_norm` that is not known.
    """
    if post_norm not in POST_NORM or outliers < 0:
        raise OrderError(
            f"post_norm={post_norm!r}, outliers={outliers} was given; expected post_norm one of "
            f"{', '.join(POST_NORM)} and a number of outliers of at least 0"
        )
    batches = list(batches)
    left = checked(doll, batches, by, None, unread)
    training = doll.training
    doll.eval()
    try:
        probe = flat_inputs(doll, batches[0])
        reference = run_graph(doll, trace_of(doll).graph, probe)
        found, obstacles = _surveyed(doll, keep)
        rotated, bases = _rotated(doll, batches, found, obstacles)
        cost = 0.0
        if post_norm == "diagonal":
            posts = {g: s for g in obstacles if (s := post_survey(doll, g)) is not None}
            for g, seen in posts.items():
                row, bases[g], moved = turned_post_norm(doll, batches, g, seen, outliers)
                rotated, cost = (*rotated, row), max(cost, moved)
                del obstacles[g]
        names = [*keep, *(doll.plan.groups[g].name.replace("[", "[[]") for g in bases)]
        ordered = order(doll, batches, by=by, keep=names, unread="leave" if left else unread)
        now = ordered.put_back(doll, run_graph(doll, trace_of(doll).graph, probe))
        error = relative_error(turned_back(doll, bases, now), reference)
    finally:
        doll.train(training)
    plan = noted(doll.plan, {}, bases)
    replan(doll, plan)
    texts = tuple((plan.groups[g].name, why) for g, why in obstacles.items() if _stream(plan, g))
    return RotateReport(plan.sizes, rotated, bases, texts, ordered, error, cost)


def _stream(plan: Plan, group: int) -> bool:
    """Whether a group has as many parameters as a stream: hidden layers and heads have few."""
    return group == plan.main or len(plan.groups[group].parameters) > 8


def _surveyed(doll: Doll, keep: Sequence[str]) -> tuple[dict[int, Survey], dict[int, str]]:
    """Survey every group; return those that rotate and why the others do not."""
    trace, plan = trace_of(doll), doll.plan
    found: dict[int, Survey] = {}
    obstacles: dict[int, str] = {}
    for g, group in enumerate(plan.groups):
        if any(fnmatch(group.name, pattern) for pattern in keep):
            continue
        seen = survey(trace.graph, plan, trace.state(), g)
        if seen.obstacles:
            obstacles[g] = seen.obstacles[0]
        elif seen.contracted and group.size > 2:
            found[g] = seen
    return found, obstacles


def _rotated(
    doll: Doll, batches: list[object], found: Mapping[int, Survey], obstacles: dict[int, str]
) -> tuple[tuple[GroupBasis, ...], dict[int, Tensor]]:
    """Fold and turn one group after the other; a group that moves the model is put back."""
    rows: list[GroupBasis] = []
    bases: dict[int, Tensor] = {}
    probe = flat_inputs(doll, batches[0])
    for g, seen in found.items():
        kept = _copies(doll, g, seen)
        before = run_graph(doll, trace_of(doll).graph, probe)
        _fold(doll, seen)
        moment = moment_of(doll, batches, g)
        widths = [w[g] for w in doll.plan.ladder]
        basis = mean_kept(moment, widths) if seen.mean else principal(moment)
        turn(trace_of(doll).state(), doll.plan, {g: basis}, seen.scales)
        after = turned_back(doll, {g: basis}, run_graph(doll, trace_of(doll).graph, probe))
        error = relative_error(after, before)
        if not error <= TOLERANCE:
            _restore(doll, kept)
            obstacles[g] = f"the full model moves by {error:.0e}"
            continue
        bases[g] = basis
        group = doll.plan.groups[g]
        energy = energy_of(moment, basis, widths)
        rows.append(GroupBasis(group.name, group.size, tuple(seen.gains), seen.mean, energy))
    return tuple(rows), bases


def _copies(doll: Doll, group: int, seen: Survey) -> dict[str, Tensor]:
    """Return copies of every tensor that folding and turning a group changes."""
    names = {n for readers in seen.readers.values() for n, _ in readers} | set(seen.gains)
    carrying = {
        name
        for name, shape in doll.plan.parameters.items()
        if any(group in dims.groups_of(d) for d in shape)
    }
    state = trace_of(doll).state()
    return {n: state[n].detach().clone() for n in names | carrying if n in state}


def _restore(doll: Doll, copies: Mapping[str, Tensor]) -> None:
    state = trace_of(doll).state()
    for name, tensor in copies.items():
        state[name].data.copy_(tensor)


def _fold(doll: Doll, seen: Survey) -> None:
    """g n + b read by W becomes n + b / g read by W diag(g): gains become ones, biases stay."""
    state = trace_of(doll).state()
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


def _scale(tensor: Tensor, factors: Tensor, dim: int) -> None:
    shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
    wide = tensor.data.to(torch.float64) * factors.view(shape)
    tensor.data.copy_(wide)
