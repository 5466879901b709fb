"""refit(): a slice's own weights, fitted layer by layer to what the full model computes.

What was cut away leaves traces in what stays: units are correlated, so those that a size holds say
much of what those beyond it said. Each product with a weight is fitted by least squares from what
the slice gives it to what the full model has there, in the order of the graph, so that later layers
make up for what earlier ones miss (as in SparseGPT's and ThiNet's reconstructions, arXiv
2301.00774, eq. 1, and 1707.06342, section 3.3, here for widths of the whole graph).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import flat_inputs
from matryoshkafy.dolls.cuts import take
from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.dolls.measure import relative_error
from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.graphs import sub_graph
from matryoshkafy.units.bases import turned
from matryoshkafy.units.fits import Fit, fits_of, origin_of
from matryoshkafy.units.least_squares import Affine, Products
from matryoshkafy.units.normed import real_rows
from matryoshkafy.units.permute import OrderError, moved
from matryoshkafy.units.report import OrderReport
from matryoshkafy.units.rotate import RotateReport

SAME = 1e-3  # how far a slice may be from the cut of the full model


@dataclass(frozen=True)
class Refitted:
    """One weight: the share of the variance of what it should give that it missed, and misses."""

    weight: str
    before: float
    after: float


@dataclass(frozen=True)
class RefitReport:
    """The result of `refit`: what was fitted, and why a weight stayed as it was."""

    rows: tuple[Refitted, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        count = max(1, len(self.rows))
        before, after = (sum(getattr(r, w) for r in self.rows) / count for w in ("before", "after"))
        lines = [
            f"refitted {len(self.rows)} weights; of what they should give they miss "
            f"{before:.1%} -> {after:.1%} on average"
        ]
        lines += [f"{r.weight:60}  {r.before:7.2%} -> {r.after:7.2%}" for r in self.rows]
        return "\n".join([*lines, *(f"{name} stays: {why}" for name, why in self.left.items())])


def refit(  # noqa: PLR0913  the public signature
    small: fx.GraphModule,
    full: Doll,
    batches: Iterable[object],
    report: OrderReport | RotateReport | None = None,
    *,
    weights: bool = True,
    ridge: float = 1e-2,
) -> RefitReport:
    """Fit the weights of a slice to the full model's values on calibration inputs, in place.

    Layer by layer, in closed form, without labels or gradients: each weight and bias becomes the
    least squares solution from what the slice gives it to the first units of what the full model
    has there. Where a product is added to a stream, the sum is to be right. The slice stays its
    class and no longer shares its weights with the doll: it is an end, or a start for training it
    alone.

    Args:
        small: a slice of a doll in sliced nesting, after `order` or `rotate`.
        full: the doll whose values are to be reached: the one that was sliced; or, where `rotate`
            moved it (`post_norm="diagonal"`), a copy from before, with the report.
        batches: calibration inputs, as for `order`; a few hundred rows, all of whose values at
            one place of the graph are in memory at once.
        report: what `order` or `rotate` returned, where `full` is from before it.
        weights: False: fit gains and biases alone.
        ridge: what pulls to the weights as they are, in mean squares of an input.

    Returns:
        The report, which prints as a table.

    Raises:
        OrderError: a masked doll, no batch, or a slice that is not the cut of `full` as the report
            turns it.
    """
    if not isinstance(cast("object", small), fx.GraphModule):
        raise OrderError(f"a {type(small).__name__} was given; expected what mk.slice returns")
    flats = [flat_inputs(full, batch) for batch in batches]
    if full.plan.masked or not flats or not ridge > 0:
        raise OrderError(
            f"a doll in {full.plan.options.nesting} nesting, {len(flats)} batches and "
            f"ridge={ridge} were given; expected sliced nesting, a batch at least, and a ridge "
            "above 0"
        )
    modes = full.training, small.training
    full.eval()
    small.eval()
    try:
        with torch.no_grad():
            return _Refit(small, full, report, (weights, ridge)).run(flats)
    finally:
        full.train(modes[0])
        small.train(modes[1])


class _View:
    """A value of the full model becomes that of a size: in its order and basis, cut."""

    def __init__(self, full: Doll, size: Plan, report: OrderReport | RotateReport | None) -> None:
        self.plan, self.widths = full.plan, size.ladder[-1]
        ordered = report.order if isinstance(report, RotateReport) else report
        bases: Mapping[int, Tensor] = report.bases if isinstance(report, RotateReport) else {}
        self.orders = ordered.permutations if ordered is not None else {}
        # The first rows alone: what comes out is cut already.
        self.bases = {g: q[: self.widths[g]] for g, q in bases.items()}

    def of(self, value: Tensor, shape: tuple[dims.Dim, ...]) -> Tensor:
        if not any(map(dims.is_nested, shape)):
            return value
        value = turned(moved(value, shape, self.orders), shape, self.bases)
        have = self.plan.ladder[-1]
        cuts = (None if self._turned(d) else dims.relative(d, have, self.widths) for d in shape)
        return take(value, tuple(cuts))

    def _turned(self, dim: dims.Dim) -> bool:
        return any(g in self.bases for g in dims.groups_of(dim))


class _Refit:
    """The full model and a slice run side by side, every batch at the same node."""

    def __init__(
        self,
        small: nn.Module,
        full: Doll,
        report: OrderReport | RotateReport | None,
        how: tuple[bool, float],
    ) -> None:
        trace, plan = parts_of(small)
        self.full, self.view = full, _View(full, plan, report)
        self.root, self.state = trace.root, trace.state()
        self.graph = sub_graph(trace, plan, plan.levels - 1)
        self.fits, self.left = fits_of(self.graph, trace_of(full).graph, self.state)
        self.weights, self.ridge = how
        self._check()

    def _check(self) -> None:
        """The slice must be the cut of the full model, or all of the fit would be nonsense."""
        whole = trace_of(self.full).state()
        for fit in (f for f in self.fits.values() if not f.norm):
            shape = self.full.plan.parameters.get(fit.weight, ())
            own = self.state[fit.weight]
            cut = self.view.of(whole[fit.weight].detach(), shape)
            if cut.shape != own.shape or not relative_error(own.detach(), cut) <= SAME:
                raise OrderError(
                    f"{fit.weight} of the slice is not what the report makes of that of the full "
                    "model; expected a slice of this doll, or of the doll that it became with the "
                    "report of order or rotate. Where rotate folded gains (pre-norm) give the "
                    "rotated doll itself and no report"
                )

    def run(self, flats: list[list[Tensor]]) -> RefitReport:
        wanted = {origin_of(fit.reached) for fit in self.fits.values()}
        graph = trace_of(self.full).graph
        full = [_Truth(walked(root_of(self.full), graph, flat), wanted) for flat in flats]
        holes = graph.find_nodes(op="placeholder")
        masks = [_mask(holes, flat) for flat in flats]
        shapes = [self.full.plan.dims(hole.name) for hole in holes]
        own = (list(map(self.view.of, flat, shapes)) for flat in flats)
        rows: list[Refitted] = []
        steps = (walked(self.root, self.graph, flat) for flat in own)
        for states in zip(*steps, strict=True):
            fit = self.fits.get(states[0][0])
            if fit is not None:
                envs = (env for _, env in states)
                rows.append(self._fitted(fit, zip(envs, full, masks, strict=True)))
        return RefitReport(tuple(rows), self.left)

    def _fitted(self, fit: Fit, batches: Iterable[tuple[Env, _Truth, Tensor | None]]) -> Refitted:
        products = Products(unitwise=bool(fit.norm))
        shape = self.full.plan.dims(origin_of(fit.reached))
        for env, truth, mask in batches:
            y = self.view.of(truth.at(origin_of(fit.reached)), shape)
            y = y if fit.other is None else y - env[fit.other]
            products.add(real_rows(_input(fit, env[fit.value]), mask), real_rows(y, mask))
        weight = self.state[fit.weight]
        bias = None if fit.bias is None else self.state[fit.bias]
        before = Affine(weight.t() if fit.turned else weight, bias)
        fixed = not (self.weights or fit.norm)
        after = products.fitted(before, self.ridge, fixed=fixed)
        row = Refitted(fit.weight, products.missed(before), products.missed(after))
        weight.data.copy_(after.weight.t() if fit.turned else after.weight)
        if bias is not None and after.bias is not None:
            bias.data.copy_(after.bias)
        return row


def _input(fit: Fit, value: Tensor) -> Tensor:
    """Return what a weight multiplies: of a norm its output without gain."""
    if not fit.norm:
        return value
    bare = F.layer_norm if fit.norm == "layer_norm" else F.rms_norm
    return bare(value.float(), value.shape[-1:], eps=fit.eps)


class _Truth:
    """The full model's values of one batch, as they are asked for."""

    def __init__(self, steps: Iterator[Step], wanted: Collection[str]) -> None:
        self.steps, self.wanted = steps, wanted
        self.last: fx.Node | None = None
        self.found: dict[str, Tensor] = {}

    def at(self, name: str) -> Tensor:
        while name not in self.found:
            node, env = next(self.steps)
            if self.last is not None and self.last.name in self.wanted:
                self.found[self.last.name] = env[self.last]
            self.last = node
        return self.found.pop(name)  # each value is reached by one fit


def _mask(holes: Iterable[fx.Node], flat: list[Tensor]) -> Tensor | None:
    found = (v for n, v in zip(holes, flat, strict=True) if str(n.target) == "attention_mask")
    return next(found, None)


Env = dict[fx.Node, Any]
Step = tuple[fx.Node, Env]


def walked(root: nn.Module, graph: fx.Graph, flat: list[Tensor]) -> Iterator[Step]:
    """Yield each node of a graph with the values that are known before it is computed."""
    run = fx.Interpreter(root, graph=graph)
    run.args_iter = iter(flat)
    for node in graph.nodes:
        yield node, run.env
        run.env[node] = run.run_node(node)
        for done in run.user_to_last_uses.get(node, []):
            run.env.pop(done, None)
