"""profile(): what a sub-model costs: parameters, bytes, FLOPs, measured latency."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from matryoshkafy.dolls.example_inputs import example_inputs
from matryoshkafy.errors import MatryoshkafyError, first_line
from matryoshkafy.kernels import ops as _ops
from matryoshkafy.kernels.levels import levels_of

Shape = Sequence[int]
TIMES = "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}"
nested = torch.ops.matryoshkafy
assert _ops


class ProfileError(MatryoshkafyError):
    """A model cannot be measured where it was asked for."""


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs.

    Args:
        parameters: scalars, ties once.
        bytes: of parameters and buffers.
        flops: two for each multiply-add of products, convolutions and attention; structural zeros
            that are stored count.
        latency: seconds, the median of the runs.
    """

    parameters: int
    bytes: int
    flops: int
    latency: float


def profile(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    runs: int = 7,
) -> Cost:
    """Return the cost of a forward pass on these inputs, without gradients.

    Args:
        model: any module.
        args: its positional inputs.
        kwargs: its inputs by name.
        runs: timed passes, after one that is not counted.
    """

    def call() -> object:
        return model(*args, **(kwargs or {}))

    parameters, held = size_of(model)
    with torch.no_grad():
        return Cost(parameters, held, flops_of(call), latency_of(call, runs))


def profile_at(
    model: nn.Module,
    device: torch.device,
    *,
    batch: int | None = None,
    length: int | None = None,
    runs: int = 7,
) -> tuple[Cost, str]:
    """Move a doll or sub-model to a device, measure a call on random inputs; return their shapes,
    too.

    Args:
        model: the model, in evaluation mode from now on.
        device: where.
        batch: rows of the inputs; those of the trace by default.
        length: their length; that of the trace by default.
        runs: timed passes.
    """
    args, kwargs = example_inputs(model.to(device), device=device, batch=batch, length=length)
    return profile(model.eval(), args, kwargs, runs=runs), shapes_of(args, kwargs)


def shapes_of(args: Sequence[object], kwargs: Mapping[str, object] | None = None) -> str:
    """Return the shapes of a call's tensors as text, "2 × 7, 2 × 7"; the first four of them."""
    leaves = pytree.tree_leaves((args, kwargs or {}))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return ", ".join(TIMES.join(map(str, t.shape)) for t in tensors[:4])


def size_of(model: nn.Module) -> tuple[int, int]:
    """Return (parameters, bytes of parameters and buffers), tied tensors once."""
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    return sum(p.numel() for p in parameters), sum(map(_bytes, tensors))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else tensor.values().nbytes


def flops_of(call: Callable[[], object]) -> int:
    """Return the floating point operations of a call, by the shapes of what it runs."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with counter:
        call()
    return counter.get_total_flops()


def latency_of(call: Callable[[], object], runs: int = 7) -> float:
    """Return the median of the seconds that a call takes, after one that is not counted."""
    _timed(call)
    return statistics.median(_timed(call) for _ in range(runs))


def _timed(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_of(name: str) -> torch.device:
    """Return a device by its name; raises ProfileError where this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ProfileError(
            f"device {name!r} was given, which cannot be used here ({first_line(error)}); expected "
            "a device of this machine such as cpu or cuda"
        ) from None
    return device


def _linear_flops(
    x: Shape, weight: Shape, bias: Shape | None, out_runs: Shape, in_runs: Shape, **_: object
) -> int:
    return 2 * math.prod(x[:-1]) * _kept(out_runs, in_runs)


def _kept(out_runs: Sequence[int], in_runs: Sequence[int]) -> int:
    """The entries of a block-triangular weight that are not structural zeros."""
    inner = levels_of(tuple(in_runs))
    pairs = zip(out_runs[::2], out_runs[1::2], strict=True)
    return sum(count * sum(k <= level for k in inner) for count, level in pairs)


def _conv_flops(x: Shape, weight: Shape, *args: object, out_shape: Shape, **_: object) -> int:
    transposed = bool(args[4])
    places = x if transposed else out_shape
    return 2 * places[0] * math.prod((*weight, *places[2:]))


FLOPS = {nested.linear_opaque: _linear_flops, nested.conv: _conv_flops}
