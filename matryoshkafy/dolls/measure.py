"""What the laws are measured with: values of graphs, prefixes, noise past a prefix, errors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import Target
from torch.utils import _pytree as pytree

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import relative
from matryoshkafy.dolls.cuts import CutState, take
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.dolls.slice import slice as slice_at
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.errors import MatryoshkafyError, PlanError, first_line
from matryoshkafy.graph.copies import forked, seed_torch
from matryoshkafy.graph.nodes import reached, sources_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.graphs import full_graph, outputs_graph

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


# How torch says that an op has no derivative: one of its own, and one of a library of the user's.
UNDERIVED = ("is not implemented", "no autograd formula was registered")


class GradientsError(MatryoshkafyError):
    """A backward fails; `absent` where an op of it has no derivative, and no model could have."""

    def __init__(self, error: Exception) -> None:
        super().__init__(first_line(error) or type(error).__name__)
        self.absent = any(words in str(error) for words in UNDERIVED)


def tolerance_of(doll: nn.Module) -> float:
    """Return what rounding may cost in the type of the doll's parameters."""
    floats = (t.dtype for t in doll.parameters() if t.is_floating_point())
    return TOLERANCE.get(next(floats, torch.float32), 1e-5)


@contextlib.contextmanager
def evaluated(doll: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode, no gradients, and random numbers that leave the caller's alone."""
    training = doll.training
    doll.eval()
    try:
        with torch.no_grad(), forked():
            yield
    finally:
        doll.train(training)


def doubled(doll: Doll, flat: Sequence[torch.Tensor]) -> tuple[Doll, list[torch.Tensor]]:
    """Return a copy of the doll and of its inputs in float64."""
    wide = [t.double() if t.is_floating_point() else t for t in flat]
    return copy.deepcopy(doll).double(), wide


def prefix_inputs(
    doll: Doll, place: tuple[Plan, int], flat: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """A sub-model takes the prefix of an input whose axis was freed."""
    plan, level = place
    holes = [n.name for n in trace_of(doll).graph.nodes if n.op == "placeholder"]
    widths = (plan.ladder[-1], plan.ladder[level])
    return [prefix(value, plan.dims(name), widths) for name, value in zip(holes, flat, strict=True)]


class Written:
    """The graphs and the slices of a doll, each made once: writing a small model's graph takes as
    long as running it.
    """

    def __init__(self, doll: Doll) -> None:
        self.doll = doll
        self.trace, self.plan = trace_of(doll), doll.plan
        self._levels: dict[int, fx.Graph] = {}
        self._slices: dict[int, fx.GraphModule] = {}

    @cached_property
    def full(self) -> fx.Graph:
        """The doll's own call."""
        return full_graph(self.trace, self.plan)

    def at(self, level: int) -> fx.Graph:
        """Return the graph of the outputs of a level."""
        if level not in self._levels:
            self._levels[level] = outputs_graph(self.trace, self.plan, [level])
        return self._levels[level]

    def slice(self, level: int) -> fx.GraphModule:
        """Return the standalone sub-model of a level."""
        if level not in self._slices:
            self._slices[level] = slice_at(self.doll, self.plan.sizes[level])
        return self._slices[level]


Seen = Callable[[fx.Node, object], str]


class Reader(fx.Interpreter):
    """Runs a graph over the state of a module, or over what is cut of a state when it is read.

    `seen` looks at every value; the first that it has something to say of is in `said`.
    """

    def __init__(
        self, graph: fx.Graph, root: nn.Module, seen: Seen | None = None, *, keeps: bool = False
    ) -> None:
        super().__init__(root, graph=graph, garbage_collect_values=not keeps)
        self.seen, self.said = seen, ""

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node."""
        value = super().run_node(n)
        if self.seen is not None and not self.said:
            self.said = self.seen(n, value)
        return value

    def get_attr(self, target: Target, args: object, kwargs: object) -> Any:
        """Return a tensor of the state."""
        root = self.module
        return (
            root.read(str(target)) if isinstance(root, CutState) else self.fetch_attr(str(target))
        )


class Recorder(Reader):
    """Runs a graph and keeps what each of the user's nodes computed."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        super().__init__(graph, root, keeps=True)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        called = n.op in ("call_function", "call_module")
        if called and n.meta.get("origin", ("", None))[1] is not None:
            self.kept[n.meta["origin"][0]] = value
        return value


def values_of(graph: fx.Graph, root: nn.Module, flat: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return what every one of the user's nodes computed, and the flat "output"."""
    recorder = Recorder(graph, root)
    seed_torch(0)  # a forward that draws random numbers draws the same ones at every size
    out = recorder.run(*flat, enable_io_processing=False)
    return recorder.kept | {"output": out}


def run(
    graph: fx.Graph, root: nn.Module, flat: Sequence[torch.Tensor], seen: Seen | None = None
) -> Any:
    """Return the flat outputs of a graph over the state of a module.

    Raises:
        PlanError: `seen` said something of a value.
    """
    seed_torch(0)
    reader = Reader(graph, root, seen)
    out = reader.run(*flat, enable_io_processing=False)
    if reader.said:
        raise PlanError(reader.said)
    return out


def gradients_of(out: object, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of a fixed random sum of outputs, by name; none where none reaches.

    Raises:
        GradientsError: the backward fails.
    """
    leaves = (leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
    smooth = [leaf for leaf in leaves if leaf.requires_grad]
    if not smooth or not weights:
        return {}
    draw = torch.Generator().manual_seed(1)
    loss = torch.stack([_projected(leaf, draw) for leaf in smooth]).sum()
    try:
        found = cast(
            "tuple[torch.Tensor | None, ...]",
            torch.autograd.grad(loss, list(weights.values()), allow_unused=True),
        )
    except Exception as error:  # a user's backward may raise anything
        raise GradientsError(error) from error
    return {n: g.to_dense() for n, g in zip(weights, found, strict=True) if g is not None}


def _projected(value: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return (real * torch.randn(real.shape, generator=draw).to(real)).sum().double()


def prefixes(
    plan: Plan, level: int, full: dict[str, Any], small: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield every trunk value by name: its prefix in the full model, and the sub-model's."""
    for name, value in small.items():
        shape = plan.dims(name)
        action = plan.actions.get(name)
        once = name not in plan.tail and (action is None or action.kind != "inner")
        known = name in full and once and name in plan.nodes
        if known and isinstance(value, torch.Tensor):
            widths = (plan.ladder[-1], plan.ladder[level])
            yield name, prefix(full[name], shape, widths), value


def prefix(
    value: torch.Tensor, shape: Sequence[dims.Dim], widths: tuple[dims.Widths, dims.Widths]
) -> torch.Tensor:
    """Return the part of a value of the first widths that is kept at the second."""
    return take(value, tuple(relative(axis, *widths) for axis in shape))


def disturb(doll: Doll, plan: Plan, level: int, generator: torch.Generator) -> None:
    """Replace everything past the prefix of a size by noise, in place."""
    for _, tensor, keep in cut_tensors(doll, plan, level):
        tensor.data.copy_(torch.where(keep, tensor, _noise_like(tensor, generator)))


def cut_tensors(
    doll: Doll, plan: Plan, level: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield every float tensor that a size cuts: its name, itself, and which entries are kept."""
    state, fed = state_of(doll), feeding(doll, plan)
    widths = (plan.ladder[-1], plan.ladder[level])
    done = set[int]()
    for name, shape in plan.parameters.items():
        tensor = state.get(name)
        if tensor is None or name in fed or id(tensor) in done or not _is_plain(tensor):
            continue
        done.add(id(tensor))
        if any(map(dims.is_nested, shape)):
            yield name, tensor, _kept(tensor, shape, widths)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided


def _kept(
    tensor: torch.Tensor,
    shape: Sequence[dims.Dim],
    widths: tuple[dims.Widths, dims.Widths],
) -> torch.Tensor:
    keep = torch.ones((), dtype=torch.bool, device=tensor.device)
    for dim, axis in enumerate(shape):
        mine = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        for a, b in relative(axis, *widths) or ((0, tensor.shape[dim]),):
            mine[a:b] = True
        keep = keep & mine.view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return keep.expand(tensor.shape)


def _noise_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of the tensor's own scale: larger values overflow in deep models, and 0 * inf is
    NaN.
    """
    scale = tensor.detach().abs().mean().clamp_min(1e-3)
    noise = scale * torch.randn(tensor.shape, generator=generator).to(tensor)
    return noise.abs() + scale / 2 if bool((tensor >= 0).all()) else noise


def feeding(doll: Doll, plan: Plan) -> set[str]:
    """Return the parameters of which every size reads a statistic (weight normalisation)."""
    taken = (n for n in trace_of(doll).graph.nodes if n.name in plan.full)
    return {str(n.target) for n in reached(taken, sources_of) if n.op == "get_attr"}


def floats_of(output: object) -> Iterator[torch.Tensor]:
    """Yield the floating tensors of a model's output, in order."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return (leaf for leaf in leaves if leaf.is_floating_point())


def relative_error(a: object, b: object) -> float:
    """Return the largest difference of two results, relative to the largest finite value of each
    tensor.
    """
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return max((tensor_error(x, y) for x, y in pairs if isinstance(y, torch.Tensor)), default=0.0)


def tensor_error(x: torch.Tensor, y: torch.Tensor, floor: float = 1e-30) -> float:
    """Return the largest difference, relative to the largest finite value of y, at least `floor`;
    equal infinities are equal.
    """
    if x.shape != y.shape or not (y.is_floating_point() or y.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    scale = y[y.isfinite()].abs().max().item() if bool(y.isfinite().any()) else 0.0
    worst = (x - y).abs()[~same].max().item()
    return worst / max(scale, floor) if worst == worst else float("inf")
