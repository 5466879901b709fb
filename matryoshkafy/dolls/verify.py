"""verify(): the laws on the user's own model, with numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from matryoshkafy.axes import dims
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import parts_of, relative, slice, state_of, take
from matryoshkafy.graph.signature import as_inputs
from matryoshkafy.plan.plan import Many, Plan
from matryoshkafy.rewrite.graphs import full_graph, outputs_graph
from matryoshkafy.rewrite.writer import FULL_LEVEL

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class SizeReport:
    """What was measured at one size; errors are relative to the largest value of the tensor.

    `output_error`: the doll's output of this size against the standalone sub-model's.
    `trunk_error`: the worst node of the trunk against the same node of the sub-model.
    `beyond_error`: how far the output moves when everything past the prefix is replaced by noise.
    `resliced`: a slice of the next larger slice equals this one bit for bit.
    """

    size: int
    output_error: float
    trunk_error: float
    beyond_error: float
    resliced: bool
    trunk_nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """The laws on one model: `passed`, the tolerance, the share of the tail, and a row per size."""

    tolerance: float
    tail_share: float
    sizes: tuple[SizeReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every law holds at every size."""
        return all(self._holds(s) for s in self.sizes)

    def _holds(self, s: SizeReport) -> bool:
        errors = (s.output_error, s.trunk_error, s.beyond_error)
        return s.resliced and all(e <= self.tolerance for e in errors)

    def __str__(self) -> str:
        head = (
            f"{'size':>6}  {'output':>9}  {'trunk':>9}  {'beyond':>9}  {'reslice':>7}  "
            f"{'parameters':>12}  {'bytes':>14}"
        )
        rows = [
            f"{s.size:>6}  {s.output_error:9.1e}  {s.trunk_error:9.1e}  {s.beyond_error:9.1e}  "
            f"{'same' if s.resliced else 'DIFFERS':>7}  {s.parameters:>12,}  {s.bytes:>14,}"
            for s in self.sizes
        ]
        verdict = "every law holds" if self.passed else "A LAW FAILS"
        return "\n".join(
            [
                head,
                *rows,
                f"{verdict} (tolerance {self.tolerance:g}, tail {self.tail_share:.0%} of nodes)",
            ]
        )


def verify(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Report:
    """Check the laws of a doll on inputs, in evaluation mode, without gradients.

    For each size: the standalone sub-model equals the doll's output of that size, its trunk equals
    the prefix of the doll's (masked) or the doll's live slices (sliced), noise past the prefix
    moves nothing, and slicing twice is slicing once. Raises `PlanError` if the model is no doll.
    """
    trace, plan = parts_of(model)
    doll = model if isinstance(model, Doll) else _as_doll(model)
    signature = trace.signature
    names = {*signature.positional, *(item.name for item in signature.inputs)}
    flat = signature.flatten(*as_inputs(args, kwargs, names))
    training = doll.training
    doll.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            return _report(doll, plan, flat)
    finally:
        doll.train(training)


def _as_doll(model: nn.Module) -> Doll:
    trace, plan = parts_of(model)
    return Doll(trace, plan)


def _report(doll: Doll, plan: Plan, flat: list[Any]) -> Report:
    work = [n for n in doll._trace.graph.nodes if n.op == "call_function"]
    share = len(plan.tail) / max(1, len(work))
    rows: list[SizeReport] = []
    larger: fx.GraphModule | None = None
    full = (
        None
        if not plan.masked
        else _values(full_graph(doll._trace, plan), doll.__dict__["_root"], flat)
    )
    noisy = copy.deepcopy(doll)
    generator = torch.Generator().manual_seed(0)
    for level in reversed(range(plan.levels)):
        small = slice(doll, plan.sizes[level])
        _disturb(noisy, plan, level, generator)
        rows.append(_size_report((doll, noisy, small, larger), (plan, level), flat, full))
        larger = small
    dtype = next((t.dtype for t in doll.parameters() if t.is_floating_point()), torch.float32)
    return Report(TOLERANCE.get(dtype, 1e-5), share, tuple(rows[::-1]))


def _size_report(models: Any, place: tuple[Plan, int], flat: list[Any], full: Any) -> SizeReport:
    doll, noisy, small, larger = models
    plan, level = place
    own = _run(outputs_graph(doll._trace, plan, [level]), doll.__dict__["_root"], flat)
    values = _values(small.graph, small, _prefix_inputs(doll, place, flat))
    reference = values.pop("output")
    moved = _run(outputs_graph(doll._trace, plan, [level]), noisy.__dict__["_root"], flat)
    if full is None:
        full = _values(outputs_graph(doll._trace, plan, [level]), doll.__dict__["_root"], flat)
        pairs = [(full[n], v) for n, v in values.items() if n in full]
    else:
        pairs = list(_prefixes(plan, level, full, values))
    return SizeReport(
        size=plan.sizes[level],
        output_error=relative_error(own, reference),
        trunk_error=max((relative_error(a, b) for a, b in pairs), default=0.0),
        beyond_error=relative_error(moved, own),
        resliced=larger is None or _same_state(slice(larger, plan.sizes[level]), small),
        trunk_nodes=len(pairs),
        parameters=sum(p.numel() for p in small.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in _tensors(small)),
    )


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _prefix_inputs(doll: Doll, place: tuple[Plan, int], flat: list[Any]) -> list[Any]:
    """A sub-model takes the prefix of an input whose axis was freed."""
    plan, level = place
    holes = [n.name for n in doll._trace.graph.nodes if n.op == "placeholder"]
    widths = (plan.ladder[-1], plan.ladder[level])
    return [
        _prefix(value, plan.nodes.get(name, ()), widths)
        for name, value in zip(holes, flat, strict=True)
    ]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each of the user's nodes computed."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        super().__init__(root, graph=graph, garbage_collect_values=False)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and n.meta.get("origin", ("", FULL_LEVEL))[1] != FULL_LEVEL:
            self.kept[n.meta["origin"][0]] = value
        return value


def _values(graph: fx.Graph, root: nn.Module, flat: list[Any]) -> dict[str, Any]:
    recorder = _Recorder(graph, root)
    torch.manual_seed(0)  # a forward that draws random numbers draws the same ones at every size
    out = recorder.run(*flat, enable_io_processing=False)
    return recorder.kept | {"output": out}


def _run(graph: fx.Graph, root: nn.Module, flat: list[Any]) -> Any:
    torch.manual_seed(0)
    return fx.Interpreter(root, graph=graph).run(*flat, enable_io_processing=False)


def _prefixes(plan: Plan, level: int, full: dict[str, Any], small: dict[str, Any]) -> Iterator[Any]:
    """Pair the prefix of every trunk value with the sub-model's value."""
    for name, value in small.items():
        shape = plan.nodes.get(name)
        known = name in full and name not in plan.tail and shape is not None
        if known and isinstance(value, torch.Tensor) and not isinstance(shape, Many):
            yield _prefix(full[name], shape, (plan.ladder[-1], plan.ladder[level])), value


def _prefix(
    value: torch.Tensor, shape: Any, widths: tuple[dims.Widths, dims.Widths]
) -> torch.Tensor:
    return take(value, tuple(relative(axis, *widths) for axis in shape))


def _disturb(doll: Doll, plan: Plan, level: int, generator: torch.Generator) -> None:
    """Replace everything past the prefix of a size by noise, in place."""
    state = state_of(doll)
    fed = _feeding(doll, plan)
    done = set()
    for name, shape in plan.parameters.items():
        tensor = state.get(name)
        if tensor is None or name in fed or id(tensor) in done or not _is_plain(tensor):
            continue
        done.add(id(tensor))
        if any(map(dims.is_nested, shape)):
            tensor.data.copy_(
                _disturbed(tensor, shape, (plan.ladder[-1], plan.ladder[level]), generator)
            )


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided


def _disturbed(
    tensor: torch.Tensor, shape: Any, widths: tuple[Any, Any], generator: torch.Generator
) -> torch.Tensor:
    noise = _noise_like(tensor, generator)
    keep = torch.ones((), dtype=torch.bool, device=tensor.device)
    for dim, axis in enumerate(shape):
        mine = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        for a, b in relative(axis, *widths) or ((0, tensor.shape[dim]),):
            mine[a:b] = True
        keep = keep & mine.view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return torch.where(keep, tensor, noise)


def _noise_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of the tensor's own scale: larger values overflow in deep models, and 0 * inf is
    NaN.
    """
    scale = tensor.detach().abs().mean().clamp_min(1e-3)
    noise = scale * torch.randn(tensor.shape, generator=generator).to(tensor)
    return noise.abs() + scale / 2 if bool((tensor >= 0).all()) else noise


def _feeding(doll: Doll, plan: Plan) -> set[str]:
    """Parameters whose full-width statistics are part of every size (weight normalisation)."""
    names, queue = set(), [n for n in doll._trace.graph.nodes if n.name in plan.full]
    while queue:
        node = queue.pop()
        if node.op == "get_attr":
            names.add(str(node.target))
        queue.extend(node.all_input_nodes)
    return names


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = state_of(a), state_of(b)
    return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is NaN


def relative_error(a: Any, b: Any) -> float:
    """Return the largest difference of two results, relative to the largest finite value of each
    tensor.
    """
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return max((_tensor_error(x, y) for x, y in pairs if isinstance(y, torch.Tensor)), default=0.0)


def _tensor_error(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if not (y.is_floating_point() or y.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    scale = y[y.isfinite()].abs().max().item() if bool(y.isfinite().any()) else 0.0
    worst = (x - y).abs()[~same].max().item()
    return worst / max(scale, 1e-30) if worst == worst else float("inf")
