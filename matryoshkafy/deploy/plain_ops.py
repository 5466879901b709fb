"""The nested operators written with plain ones, for formats that know nothing of ours."""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Argument, has_side_effect

from matryoshkafy.graph import paths
from matryoshkafy.kernels import ops as _ops
from matryoshkafy.kernels.levels import levels_of
from matryoshkafy.kernels.reductions import level_reduce

if TYPE_CHECKING:
    from typing_extensions import Unpack

nested = torch.ops.matryoshkafy
assert _ops


# The dims of a statistic, the one that nests, its runs, and whether a prefix is taken.
Place = tuple[list[int], int, list[int], bool]


def _moments(x: Tensor, place: Place, *, centred: bool) -> tuple[Tensor | float, Tensor]:
    """Mean (0 where not centred) and mean square deviation of each unit's level."""
    dims, dim, runs, prefix = place
    if not centred:
        return 0.0, level_reduce(x.square(), dims, dim, runs, "mean", prefix)
    mean = level_reduce(x, dims, dim, runs, "mean", prefix)
    return mean, level_reduce(x, dims, dim, runs, "var0", prefix)


def _normalised(x: Tensor, place: Place, eps: float, *, centred: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    mean, square = _moments(wide, place, centred=centred)
    return (wide - mean) * torch.rsqrt(square + eps)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def plain_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    runs: list[int],
    prefix: bool,
) -> Tensor:
    """matryoshkafy::layer_norm in plain ATen."""
    if _single(runs):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = _normalised(x, ([-1], -1, runs, prefix), eps, centred=True)
    return _affine(y, weight, bias, [-1]).to(x.dtype)


def plain_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, runs: list[int], prefix: bool
) -> Tensor:
    """matryoshkafy::rms_norm in plain ATen."""
    y = _normalised(x, ([-1], -1, runs, prefix), eps, centred=False)
    return _affine(y, weight, None, [-1]).to(x.dtype)


def plain_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    runs: list[int],
    prefix: bool,
) -> Tensor:
    """matryoshkafy::group_norm in plain ATen."""
    y = _normalised(x, (list(range(1, x.ndim)), 1, runs, prefix), eps, centred=True)
    return _affine(y, weight, bias, [-1] + [1] * (x.ndim - 2)).to(x.dtype)


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """matryoshkafy::linear in plain ATen; keep [out, in] instead of the runs."""
    return F.linear(x, masked_weight(weight, 0, 1, keep), bias)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor,
    *geometry: Unpack[tuple[list[int], list[int], list[int], bool, list[int], int]],
) -> Tensor:
    """matryoshkafy::conv in plain ATen; keep [out, in] within a group instead of the runs."""
    *_, transposed, _, groups = geometry
    turned = (keep.t() if transposed else keep).repeat(groups, 1)
    return torch.convolution(x, masked_weight(weight, 0, 1, turned), bias, *geometry)


def masked_weight(weight: Tensor, out: int, into: int, keep: Tensor) -> Tensor:
    """matryoshkafy::mask in plain ATen; keep [out, in] instead of the runs."""
    out, into = out % weight.ndim, into % weight.ndim
    shape = [n if dim in (out, into) else 1 for dim, n in enumerate(weight.shape)]
    turned = (keep if out < into else keep.t()).reshape(shape)
    return torch.where(turned, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


@has_side_effect
def plain_path(value: Tensor, expected: list[float], where: str) -> None:
    """matryoshkafy::path in plain ATen."""
    torch.ops.aten._assert_async.msg(paths.same(value, expected), paths.refusal(where))


@has_side_effect
def plain_path_size(size: int, expected: int, where: str) -> None:
    """matryoshkafy::path_size as a condition on a size."""
    torch._check(size == expected, lambda: paths.refusal(where))


def _single(runs: list[int]) -> bool:
    return len({level for count, level in zip(runs[::2], runs[1::2], strict=True) if count}) <= 1


def _write_keep(root: nn.Module, node: fx.Node) -> list[Argument]:
    """Replace the runs at the end of the arguments by the matrix of kept entries, a buffer."""
    *rest, out_runs, in_runs = node.args
    out, into = (torch.tensor(levels_of(tuple(cast("list[int]", r)))) for r in (out_runs, in_runs))
    name = f"keep_{node.name}"
    root.register_buffer(name, out[:, None] >= into[None, :], persistent=False)
    with node.graph.inserting_before(node), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*rest, node.graph.get_attr(name)]


def _last(values: list[Argument]) -> list[Argument]:
    return values


def _fourth(values: list[Argument]) -> list[Argument]:
    *rest, keep = values
    return [*rest[:3], keep, *rest[3:]]


Order = Callable[[list[Argument]], list[Argument]]
MASKED: Mapping[object, tuple[Callable[..., Tensor], Order]] = {
    nested.linear.default: (masked_linear, _last),
    nested.conv.default: (masked_conv, _fourth),
    nested.mask.default: (masked_weight, _last),
}


PLAIN: Mapping[object, Callable[..., Tensor | None]] = {
    nested.layer_norm.default: plain_layer_norm,
    nested.rms_norm.default: plain_rms_norm,
    nested.group_norm.default: plain_group_norm,
    nested.level_reduce.default: level_reduce,
    paths.PATH: plain_path,
    paths.PATH_SIZE: plain_path_size,
}


def write_plainly(root: nn.Module, node: fx.Node) -> None:
    if node.target in MASKED:
        function, order = MASKED[node.target]
        node.args = tuple(order(_write_keep(root, node)))
        node.target = function
    elif node.target in PLAIN:
        node.target = PLAIN[node.target]
