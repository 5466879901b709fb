"""profiling.py: counts by arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from matryoshkafy.deploy.profile import device_of, flops_of, latency_of, profile, size_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels import ops as _ops

assert _ops


def test_parameters_and_bytes_count_ties_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(3, 4))
    model[2].weight = model[0].weight
    # Weight 12, two biases 4, norm 8; its two statistics of 4 floats and a counter of 8 bytes.
    assert size_of(model) == (12 + 4 + 4 + 8, 4 * 28 + 4 * 8 + 8)


def test_bytes_follow_the_dtype():
    assert size_of(nn.Linear(3, 4).bfloat16()) == (16, 32)


@pytest.mark.parametrize(("batch", "ins", "outs"), [(1, 3, 4), (5, 7, 2)])
def test_flops_of_a_linear(batch, ins, outs):
    cost = profile(nn.Linear(ins, outs), (torch.randn(batch, ins),), runs=1)
    assert cost.flops == 2 * batch * ins * outs
    assert cost.latency > 0


def test_flops_of_a_block_triangular_linear_leave_out_the_zeros():
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    runs = ([2, 0, 4, 1], [4, 0, 4, 1])
    flops = flops_of(lambda: torch.ops.matryoshkafy.linear(x, weight, None, *runs))
    # Two rows read four columns, four rows read all eight.
    assert flops == 2 * 3 * (2 * 4 + 4 * 8)


def test_flops_of_a_masked_convolution():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    runs = ([6, 0], [4, 0])
    flops = flops_of(lambda: torch.ops.matryoshkafy.conv(x, weight, None, *geometry, *runs))
    assert flops == flops_of(lambda: torch.nn.functional.conv2d(x, weight))
    assert flops == 2 * 2 * 6 * 4 * 9 * 3 * 3


def test_latency_calls_once_more_than_it_times():
    calls = []
    assert latency_of(lambda: calls.append(1), runs=3) >= 0
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["toaster", "cuda:99", ""])
def test_a_device_that_is_not_here(name):
    with pytest.raises(MatryoshkafyError, match="was given, which cannot be used here.*expected"):
        device_of(name)


def test_a_device_that_is_here():
    assert device_of("cpu").type == "cpu"
