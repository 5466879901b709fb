"""Law 5 for values that are not finite: what lies beyond a prefix does not reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.kernels import ops as _ops

assert _ops
nested = torch.ops.matryoshkafy
BAD = [torch.inf, -torch.inf, torch.nan]


def runs_of(width: int) -> list[int]:
    quarter = width // 4
    return [quarter, 0, quarter, 1, 2 * quarter, 2]


def prefix_of(width: int, level: int) -> int:
    return [width // 4, width // 2, width][level]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("width", [16, 256, 512])
@pytest.mark.parametrize("grad", [False, True])
def test_linear(bad: float, width: int, grad: bool) -> None:
    x, weight, bias = torch.randn(40, width), torch.randn(width, width), torch.randn(width)
    x[:, width // 4 :: 7] = bad
    weight.requires_grad_(grad)
    y = nested.linear(x, weight, bias, runs_of(width), runs_of(width))
    small = width // 4
    expected = F.linear(x[:, :small], weight[:small, :small], bias[:small])
    torch.testing.assert_close(y[:, :small], expected)
    assert not y[:, small:].isfinite().any()
    clean = torch.where(x.isfinite(), x, 0)
    plain = nested.linear(clean, weight, bias, runs_of(width), runs_of(width))
    torch.testing.assert_close(y[:, :small], plain[:, :small])


@pytest.mark.parametrize("width", [16, 512])
def test_the_middle_level_keeps_its_own(width: int) -> None:
    x, weight = torch.randn(3, width), torch.randn(width, width)
    x[1, -1] = torch.inf
    y = nested.linear(x, weight, None, runs_of(width), runs_of(width))
    half = width // 2
    assert y[:, :half].isfinite().all() and y[[0, 2]].isfinite().all()
    keep = torch.arange(half) < width // 4
    shown = weight[:half, :half] * (keep[None] | ~keep[:, None])
    torch.testing.assert_close(y[:, :half], x[:, :half] @ shown.T)


@pytest.mark.parametrize("kind", ["plain", "grouped", "transposed"])
@pytest.mark.parametrize("width", [8, 128])
def test_convolution(kind: str, width: int) -> None:
    groups = 2 if kind == "grouped" else 1
    make: Callable[..., Any] = nn.ConvTranspose1d if kind == "transposed" else nn.Conv1d
    layer = make(width, width, 3, groups=groups)
    x = torch.randn(2, width, 9)
    bad = x.clone().view(2, groups, width // groups, 9)
    bad[:, :, width // groups // 4 :] = torch.inf
    found, clean = (convolved(layer, t, groups, kind) for t in (bad.view_as(x), x))
    share = width // groups // 4
    for group in range(groups):
        rows = slice(group * width // groups, group * width // groups + share)
        torch.testing.assert_close(found[:, rows], clean[:, rows])
    assert not found.isfinite().all()


def convolved(layer: Any, x: Tensor, groups: int, kind: str) -> Tensor:
    runs = runs_of(layer.in_channels // groups)
    sizes = (layer.stride, layer.padding, layer.dilation)
    where = (kind == "transposed", layer.output_padding, groups)
    return nested.conv(x, layer.weight, layer.bias, *sizes, *where, runs, runs)


def test_a_doll_keeps_its_small_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5))
    doll, x = mk.convert(model, torch.randn(2, 3), sizes=[4, 8, 16]), torch.randn(6, 3)
    expected = mk.slice(doll, 4)(x)
    with torch.no_grad():
        model[0].weight[12] = torch.inf
    outputs = doll.outputs(x)
    torch.testing.assert_close(outputs[4], expected)
    assert outputs[8].isfinite().all() and not outputs[16].isfinite().all()
