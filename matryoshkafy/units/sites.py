"""Sites: where a group's units are read by a weight, and what is measured there.

The importance of a unit shows where it is about to be used: at the input of the contractions with
weights that sum over it. Statistics are float32 (or wider) and streamed: one number per index and
site, or one square matrix, whatever the number of batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.graph.nodes import bound_args, gives_several, tensor_info
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rules import op_of
from matryoshkafy.rules.weights import weight_places


@dataclass(frozen=True)
class Site:
    """A value that weights read: its node, the dim that they sum over, and the groups in it.

    `consumers` are pairs (node, weight node, the weight's summed dim); none where a value is
    measured for want of a reader.
    """

    node: str
    position: int
    dim: Dim
    consumers: tuple[tuple[str, str, int], ...] = ()

    @property
    def groups(self) -> frozenset[int]:
        """The groups whose units are measured here."""
        return frozenset(dims.groups_of(self.dim))


@dataclass
class Measured:
    """What was streamed at one site.

    `magnitude` [n]: sum over samples of (mean over positions of |x|) squared. `square` [n]: sum of
    x squared over all rows; `rows` how many. `moment` [n, n]: sum of x' x over all rows. `weight`
    [n, n]: sum over the readers of W' W, `reach` [n] its diagonal.
    """

    magnitude: Tensor
    square: Tensor
    reach: Tensor
    moment: Tensor | None = None
    weight: Tensor | None = None
    rows: int = 0
    weighed: set[str] = field(default_factory=set[str])


def sites_of(graph: fx.Graph, plan: Plan) -> list[Site]:
    """Return the sites of a graph; a group that no weight reads is measured at its last value."""
    found: dict[tuple[str, int], Site] = {}
    for node in graph.nodes:
        for site in _read_by(node, plan):
            known = found.get((site.node, site.position))
            consumers = site.consumers if known is None else known.consumers + site.consumers
            found[site.node, site.position] = Site(site.node, site.position, site.dim, consumers)
    seen = {group for site in found.values() for group in site.groups}
    missing = set(range(len(plan.groups))) - seen
    return [*found.values(), *_last_values(graph, plan, missing)]


def _read_by(node: fx.Node, plan: Plan) -> list[Site]:
    reads = op_of(node).reads
    if reads is None:
        return []
    args, places = bound_args(node), weight_places(node)
    value = args.get(reads[0])
    weights = [w for w in places if w is not value and places[w].into]
    if not isinstance(value, fx.Node) or not weights or value in places:
        return []
    shape = plan.dims(value.name)
    position = len(shape) + reads[1]
    plain = not gives_several(value) and 0 <= position < len(shape)
    if not plain or not dims.is_nested(shape[position]):
        return []
    weight = weights[0]
    into = places[weight].into[0]
    same = tensor_info(weight).shape[into] == dims.size(shape[position])
    consumers = ((node.name, weight.name, into),) if same else ()
    return [Site(value.name, position, shape[position], consumers)]


def _last_values(graph: fx.Graph, plan: Plan, missing: set[int]) -> list[Site]:
    found: list[Site] = []
    for node in reversed(list(graph.nodes)):
        shape = plan.dims(node.name)
        if node.op != "call_function" or gives_several(node):
            continue
        for position, dim in enumerate(shape):
            if missing & set(dims.groups_of(dim)):
                missing -= set(dims.groups_of(dim))
                found.append(Site(node.name, position, dim))
    return found


class _Meter(fx.Interpreter):
    """Runs the graph and adds what passes the sites to what was measured."""

    def __init__(self, doll: Doll, sites: Iterable[Site], *, moments: bool) -> None:
        super().__init__(root_of(doll), graph=trace_of(doll).graph)
        self.moments = moments
        self.sites: dict[str, list[Site]] = {}
        self.readers: dict[str, list[tuple[Site, fx.Node, int]]] = {}
        self.measured: dict[Site, Measured] = {}
        nodes = {n.name: n for n in trace_of(doll).graph.nodes}
        self.mask = next((n for n in nodes.values() if str(n.target) == "attention_mask"), None)
        self.keep: Tensor | None = None
        for site in sites:
            self.sites.setdefault(site.node, []).append(site)
            for reader, weight, into in site.consumers:
                self.readers.setdefault(reader, []).append((site, nodes[weight], into))

    def run_node(self, n: fx.Node) -> Any:
        for site, weight, into in self.readers.get(n.name, []):
            of = self.measured.get(site)
            if of is not None and n.name not in of.weighed:
                _weigh(of, self.env[weight], into)
                of.weighed.add(n.name)
        value = super().run_node(n)
        if n is self.mask:
            self.keep = value
        for site in self.sites.get(n.name, []):
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                self._measure(site, value)
        return value

    def _measure(self, site: Site, value: Tensor) -> None:
        rows = _rows(value, site.position)
        keep = _kept_positions(self.keep, value, site.position)
        if keep is not None:
            rows = rows * keep
        count = keep.sum(1) if keep is not None else torch.tensor(float(rows.shape[1]))
        into = self._of(site, rows)
        into.magnitude += (rows.abs().sum(1) / count.clamp_min(1)).square().sum(0)
        into.square += rows.square().sum((0, 1))
        into.rows += int(count.sum()) if keep is not None else rows.shape[0] * rows.shape[1]
        if into.moment is not None:
            flat = rows.flatten(0, 1)
            into.moment += flat.t() @ flat

    def _of(self, site: Site, rows: Tensor) -> Measured:
        if site not in self.measured:
            n = rows.shape[-1]
            zeros = rows.new_zeros(n)
            square = rows.new_zeros(n, n) if self.moments else None
            other = None if square is None else square.clone()
            self.measured[site] = Measured(zeros, zeros.clone(), zeros.clone(), square, other)
        return self.measured[site]


def _weigh(of: Measured, weight: Tensor, into: int) -> None:
    """Add what a reader does with each index: W' W, or its diagonal alone."""
    columns = _real(weight.detach()).movedim(into, -1).flatten(0, -2)
    of.reach += columns.square().sum(0)
    if of.weight is not None:
        of.weight += columns.t() @ columns


def _real(value: Tensor) -> Tensor:
    """Return the value in float32 or wider; of a complex one its magnitude."""
    value = value.abs() if value.is_complex() else value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _rows(value: Tensor, position: int) -> Tensor:
    """Return [samples, positions, n] in float32 or wider."""
    value = _real(value).movedim(position, -1)
    return value[None, None] if value.dim() == 1 else value.reshape(len(value), -1, value.shape[-1])


def _kept_positions(mask: Tensor | None, value: Tensor, position: int) -> Tensor | None:
    """Return [samples, positions, 1] of ones where a token is real; None where no mask fits."""
    fits = (
        mask is not None
        and mask.dim() == 2
        and not mask.is_floating_point()  # one that is added to scores holds no zeros and ones
        and value.dim() >= 3
        and position >= 2
        and value.shape[:2] == mask.shape
    )
    if not fits or mask is None:
        return None
    repeats = value.numel() // value.shape[position] // mask.numel()
    return mask.to(torch.float32).repeat_interleave(repeats, 1)[..., None]


def measure(
    doll: Doll,
    batches: Iterable[list[Any]],
    *,
    moments: bool = False,
    groups: Collection[int] | None = None,
) -> dict[Site, Measured]:
    """Stream flat batches through the full model and return what was measured at each site.

    Args:
        doll: in evaluation mode.
        batches: flat inputs of the doll's graph.
        moments: whether the matrices [n, n] are measured too.
        groups: measure the sites of these groups alone; None: of all.
    """
    sites = sites_of(trace_of(doll).graph, doll.plan)
    wanted = [s for s in sites if groups is None or s.groups & set(groups)]
    return measure_at(doll, batches, wanted, moments=moments)


def measure_at(
    doll: Doll, batches: Iterable[list[Any]], sites: Iterable[Site], *, moments: bool
) -> dict[Site, Measured]:
    """Stream flat batches through the full model and return what was measured at given sites."""
    meter = _Meter(doll, sites, moments=moments)
    with torch.no_grad():
        for flat in batches:
            meter.run(*flat, enable_io_processing=False)
    return {site: on_host(m) for site, m in meter.measured.items()}


def on_host(m: Measured) -> Measured:
    """Return what was measured on the CPU, where units are compared one by one."""
    tensors = {n: v.cpu() for n, v in vars(m).items() if isinstance(v, Tensor)}
    return replace(m, **tensors)
