"""rotate(): the change of basis that each axis allows; the full model's function unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import Tensor

from matryoshkafy.dolls.batches import flat_inputs, run_graph
from matryoshkafy.dolls.doll import Doll, replan, trace_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.exactly import turned_exactly
from matryoshkafy.units.order import checked, order
from matryoshkafy.units.output_basis import turned_output
from matryoshkafy.units.permute import OrderError, in_tree, inverse, noted, put_back
from matryoshkafy.units.post_norm import post_survey, turned_post_norm
from matryoshkafy.units.report import OrderReport
from matryoshkafy.units.states import Survey
from matryoshkafy.units.survey import survey
from matryoshkafy.units.turning import GroupBasis, moment_of, turned_back

POST_NORM = ("permute", "diagonal")


@dataclass(frozen=True)
class RotateReport:
    """The result of `rotate`.

    `rotated` rows of the groups in a new basis, `bases` their matrices [n, n] by group (new = basis
    @ old), `obstacles` (group, why) of those that were permuted instead, `order` what became of
    these (None with scope="output", where nothing is permuted), `error` how far the full model
    moved on the first batch, `cost` how far it moved for the diagonal gains of post-norm streams
    (0.0 without such). `plan` has the dims that carry the output of scope="output".
    """

    sizes: tuple[int, ...]
    rotated: tuple[GroupBasis, ...]
    bases: Mapping[int, Tensor]
    obstacles: tuple[tuple[str, str], ...]
    order: OrderReport | None
    error: float
    cost: float = 0.0
    plan: Plan | None = None

    def put_back(self, doll: Doll, output: object) -> Any:
        """Return a full-size output of the doll in the old basis and order."""
        output = output if self.order is None else self.order.put_back(doll, output)
        return in_tree(partial(turned_back, doll, self.bases, plan=self.plan), output)

    def turn(self, doll: Doll, output: object) -> Any:
        """Return a full-size output of the old model in the doll's basis and order."""
        bases = {g: q.t() for g, q in self.bases.items()}
        turned = in_tree(partial(turned_back, doll, bases, plan=self.plan), output)
        if self.order is None:
            return turned
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
        return "\n".join(lines if self.order is None else [*lines, str(self.order)])


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

    With scope="output" the vector that the model returns is turned into its principal directions,
    where a weight writes it and no gain stands on it; `add_dense` gives a sentence encoder such a
    weight. `by`, `keep`, `post_norm` and `outliers` have no meaning there.

    Args:
        doll: a doll in sliced nesting, or of scope="output"; its parameters, which are the user's,
            change.
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
        OrderError: as for `order`; a word for `post_norm` that is not known; with scope="output",
            what keeps the output from being turned.
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
        if doll.plan.options.scope == "output":
            return _of_output(doll, batches)
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


def _of_output(doll: Doll, batches: list[object]) -> RotateReport:
    made, plan = turned_output(doll, batches)
    return RotateReport(plan.sizes, (made.row,), {0: made.basis}, (), None, made.error, plan=plan)


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
    for g, seen in found.items():
        moment = partial(moment_of, doll, batches, g)
        made = turned_exactly(doll, doll.plan, seen, batches[0], moment)
        if isinstance(made, str):
            obstacles[g] = made
            continue
        bases[g] = made.basis
        rows.append(made.row)
    return tuple(rows), bases
