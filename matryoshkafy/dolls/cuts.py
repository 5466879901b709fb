"""What a sub-model keeps of a doll's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Segments, Widths, relative
from matryoshkafy.graph.nodes import bound_args, op_key, reached, sources_of
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.held import is_reparametrised
from matryoshkafy.plan.plan import Plan, Stored
from matryoshkafy.plan.stored import statistics
from matryoshkafy.rewrite.codegen import runnable


@dataclass(frozen=True)
class MaskRuns:
    """The levels along the output and the input dim of a masked weight, run-length coded."""

    out: int
    into: int
    out_runs: tuple[int, ...]
    in_runs: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What a sub-model keeps of one tensor: per dim the kept segments (None: all of it); `number`
    is what a constant of a width is there.
    """

    name: str
    segments: tuple[Segments | None, ...]
    mask: MaskRuns | None = None
    number: float | None = None


def cuts_of(plan: Plan, level: int) -> list[Cut]:
    """Return what the sub-model of a level keeps of every tensor that its graph reads."""
    have, want = plan.ladder[-1], plan.ladder[level]
    return [
        Cut(
            name,
            tuple(relative(d, have, want) for d in kept.dims),
            _mask_runs(kept, plan.ladder[: level + 1]),
            None if kept.scalar is None else kept.scalar.at(want[kept.scalar.group]),
        )
        for name, kept in plan.stored.items()
        if not plan.is_gone(kept.dims, level)
    ]


def _mask_runs(kept: Stored, ladder: tuple[Widths, ...]) -> MaskRuns | None:
    if kept.mask is None:
        return None
    out, into = kept.mask.out, kept.mask.into
    return MaskRuns(
        out, into, dims.runs(kept.dims[out], ladder), dims.runs(kept.dims[into], ladder)
    )


def cut(
    trace: Trace, plan: Plan, state: Mapping[str, torch.Tensor], level: int
) -> tuple[dict[str, torch.Tensor], dict[str, Kind]]:
    """Return every tensor of a sub-model as memory of its own, and how each stands in the model."""
    state = _with_statistics(trace, plan, state)
    tensors = _cut_state(state, cuts_of(plan, level))
    if level < plan.levels - 1:
        tensors |= reparametrised(trace, plan, state, level)
    return tensors, kinds_of(state)


def _with_statistics(
    trace: Trace, plan: Plan, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    full = full_statistics(trace, plan).items()
    return {**state, **{name: torch.detach(t) for name, t in full}}


def _cut_state(state: Mapping[str, torch.Tensor], cuts: list[Cut]) -> dict[str, torch.Tensor]:
    """Return the cut tensors; names tied in the doll stay tied."""
    made: dict[tuple[int, tuple[Segments | None, ...]], torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    for cut in cuts:
        key = (id(state[cut.name]), cut.segments)
        if key not in made:
            made[key] = _cut_tensor(state, cut)
        out[cut.name] = made[key]
    return out


def _cut_tensor(state: Mapping[str, torch.Tensor], cut: Cut) -> torch.Tensor:
    return completed(take(state[cut.name], cut.segments), cut)


def take(tensor: torch.Tensor, segments: tuple[Segments | None, ...]) -> torch.Tensor:
    """Return the kept part of a tensor as memory of its own."""
    tensor = _kept(tensor, segments)
    return (
        tensor.clone(memory_format=torch.contiguous_format)
        if tensor.layout == torch.strided
        else tensor
    )


def _kept(tensor: torch.Tensor, segments: tuple[Segments | None, ...]) -> torch.Tensor:
    tensor = tensor.detach()
    for dim, kept in enumerate(segments):
        if kept is not None and len(kept) == 1:
            tensor = tensor.narrow(dim, kept[0][0], kept[0][1] - kept[0][0])
        elif kept is not None:
            index = torch.cat([torch.arange(a, b, device=tensor.device) for a, b in kept])
            tensor = tensor.index_select(dim, index)
    return tensor


def completed(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Write into a cut tensor, in place, what it has of its size: structural zeros, a constant."""
    if cut.number is not None:
        tensor.fill_(cut.number if tensor.is_floating_point() else round(cut.number))
    if cut.mask is not None:
        _write_zeros(tensor, cut.mask)
    return tensor


def _write_zeros(tensor: torch.Tensor, mask: MaskRuns) -> None:
    """Block by block, without a mask."""
    start = 0
    for length, level in zip(mask.out_runs[::2], mask.out_runs[1::2], strict=True):
        rows = tensor.narrow(mask.out, start, length)
        at = 0
        for width, other in zip(mask.in_runs[::2], mask.in_runs[1::2], strict=True):
            if other > level:
                rows.narrow(mask.into, at, width).zero_()
            at += width
        start += length


# Ops that read a weight as well where it lies, with gaps between its rows.
READ_WITH_GAPS = {"embedding", "linear"}


class CutState(nn.Module):
    """What the graph of a sub-model reads, cut when it is read: who only computes with a slice
    holds one weight of it at a time.

    Args:
        trace: the trace of a doll.
        plan: its plan.
        state: every tensor of it by the user's names.
        level: which size.
        graph: the sub-model's.
    """

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        state: Mapping[str, torch.Tensor],
        level: int,
        graph: fx.Graph,
    ) -> None:
        super().__init__()
        self.training = trace.root.training
        self._state = _with_statistics(trace, plan, state)
        self._cuts = {cut.name: cut for cut in cuts_of(plan, level)}
        reads = graph.find_nodes(op="get_attr")
        in_place = (n for n in reads if READ_WITH_GAPS.issuperset(map(op_key, n.users)))
        self._in_place = {str(n.target) for n in in_place}
        smaller = level < plan.levels - 1
        self._made = reparametrised(trace, plan, self._state, level) if smaller else {}

    def read(self, name: str) -> object:
        """Return what the graph reads under a name: a tensor, or whether this is training mode."""
        if name == "training":
            return self.training
        if name in self._made:
            return self._made[name]
        cut = self._cuts[name]
        if cut.mask is None and name in self._in_place:
            return _kept(self._state[name], cut.segments)
        return _cut_tensor(self._state, cut)


def reparametrised(
    trace: Trace, plan: Plan, state: Mapping[str, torch.Tensor], level: int
) -> dict[str, torch.Tensor]:
    """Return v and g of weight-normalised weights so that g v / |v| is the cut of the full
    weight.
    """
    out: dict[str, torch.Tensor] = {}
    already = plan.ladder[-1] != tuple(g.size for g in plan.groups)
    for node in trace.graph.nodes:
        if node.name in plan.full and is_reparametrised(node):
            names = [str(n.target) for n in node.all_input_nodes[:2]]
            v, g = (state[n].detach() for n in names)
            dim = int(bound_args(node).get("dim", 0))
            weight = v if already else torch.ops.aten._weight_norm(v, g, dim)
            shape = plan.dims(node.name)
            pairs = [relative(d, plan.ladder[-1], plan.ladder[level]) for d in shape]
            out[names[0]] = take(weight, tuple(pairs))
            out[names[1]] = torch.norm_except_dim(out[names[0]], 2, dim)
    return out


def full_statistics(trace: Trace, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the parameter-only statistics that a sub-model keeps as they are at full width."""
    sources = statistics(plan)
    if not sources:
        return {}
    state = trace.state()
    kept = {name: state[name] for name in sources if name in state}
    missing = [name for name in sources if name not in kept]
    nodes = {n.name: n for n in trace.graph.nodes}
    values = _evaluate(trace, [nodes[sources[name]] for name in missing])
    return kept | dict(zip(missing, values, strict=True))


def _evaluate(trace: Trace, nodes: list[fx.Node]) -> list[torch.Tensor]:
    if not nodes:
        return []
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    needed = reached(nodes, sources_of)
    for node in (n for n in trace.graph.nodes if n in needed):
        memo[node] = graph.node_copy(node, lambda n: memo[n])
    graph.output([memo[n] for n in nodes])
    with torch.no_grad():
        return runnable(trace.root, graph)()


@dataclass(frozen=True)
class Kind:
    """How a tensor stands in the user's model."""

    parameter: bool
    requires_grad: bool


def kinds_of(state: Mapping[str, torch.Tensor]) -> dict[str, Kind]:
    """Return how each tensor stands in the model."""
    return {n: Kind(isinstance(t, nn.Parameter), t.requires_grad) for n, t in state.items()}
