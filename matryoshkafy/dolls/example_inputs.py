"""example_inputs(): random inputs for a converted model, where the user's own are not at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.graph.nodes import TensorInfo, tensor_info
from matryoshkafy.graph.signature import Signature

Bounds = tuple[float, float] | None


def example_inputs(
    model: nn.Module,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch: int | None = None,
    length: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) that fit a doll or sub-model: shapes and dtypes as it was traced with.

    Values are drawn between the least and the largest of the inputs that the model was traced with
    (token ids stay inside the vocabulary, a mask of ones stays one); floats whose range is not
    known are normal, integers and booleans one.

    Args:
        model: a doll or a sub-model.
        seed: of the values.
        device: where the tensors are.
        batch: another size of dim 0, where a tensor has that of the first one.
        length: another size of dim 1, likewise. A call outside the trace's guards is refused.

    Returns:
        (args, kwargs): call `model(*args, **kwargs)`.
    """
    trace, _ = parts_of(model)
    infos = [tensor_info(n) for n in trace.graph.nodes if n.op == "placeholder"]
    infos = [_resized(info, infos[0], (batch, length)) for info in infos]
    draw = torch.Generator().manual_seed(seed)
    tensors = (
        _tensor(info, bounds, draw).to(device)
        for info, bounds in zip(infos, _bounds(trace.signature), strict=True)
    )
    return trace.signature.call(tensors)


def _resized(info: TensorInfo, first: TensorInfo, sizes: tuple[int | None, ...]) -> TensorInfo:
    """The shape with other leading sizes, where it has those of the first input."""
    shape = list(info.shape)
    for dim, size in enumerate(sizes):
        shared = dim < min(len(shape), len(first.shape)) and shape[dim] == first.shape[dim]
        if size is not None and shared:
            shape[dim] = size
    return TensorInfo(tuple(shape), info.dtype)


def _bounds(signature: Signature) -> Iterator[Bounds]:
    for item in signature.inputs:
        known = item.bounds or (None,) * len(item.leaves)
        yield from (b for b, is_tensor in zip(known, item.is_tensor, strict=True) if is_tensor)


def _tensor(info: TensorInfo, bounds: Bounds, draw: torch.Generator) -> Tensor:
    if info.dtype.is_complex:
        return torch.randn(info.shape, generator=draw, dtype=torch.complex64).to(info.dtype)
    if bounds is None and info.dtype.is_floating_point:
        return torch.randn(info.shape, generator=draw).to(info.dtype)
    low, high = bounds or (1, 1)
    share = torch.rand(info.shape, generator=draw, dtype=torch.float64)
    if info.dtype.is_floating_point:
        return (low + share * (high - low)).to(info.dtype)
    return (low + (share * (high - low + 1)).floor().clamp(max=high - low)).to(info.dtype)
