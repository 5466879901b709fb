"""MRL heads: their arithmetic, their slices, and the fused loss through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.losses import MatryoshkaLoss
from matryoshkafy.losses.heads import MRLEHead, MRLHead

SIZES = [8, 2, 16, 1]


@pytest.fixture
def hidden():
    return torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_mrl_has_a_classifier_per_size(hidden, bias):
    head = MRLHead(16, 7, SIZES, bias=bias).double()
    outputs = head(hidden)
    assert list(outputs) == sorted(SIZES)
    for size, logits in outputs.items():
        torch.testing.assert_close(logits, head.slice(size)(hidden[..., :size]))
    assert sum(p.numel() for p in head.parameters()) == 7 * sum(SIZES) + bias * 4 * 7


@pytest.mark.parametrize("bias", [True, False])
def test_mrle_shares_one_classifier(hidden, bias):
    head = MRLEHead(16, 7, SIZES, bias=bias).double()
    for outputs in (head(hidden), head.outputs(hidden)):
        assert list(outputs) == sorted(SIZES)
        for size, logits in outputs.items():
            expected = F.linear(hidden[..., :size], head.weight[:, :size], head.bias)
            torch.testing.assert_close(logits, expected)
            torch.testing.assert_close(logits, head.slice(size)(hidden[..., :size]))
    assert sum(p.numel() for p in head.parameters()) == 7 * 16 + bias * 7


@pytest.mark.parametrize("kind", [MRLHead, MRLEHead])
def test_loss_through_the_outputs(hidden, kind):
    head = kind(16, 7, SIZES).double()
    target = torch.randint(0, 7, (5, 3))
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())(head.outputs(hidden), target)
    expected = sum(
        F.cross_entropy(out.reshape(-1, 7), target.reshape(-1)) for out in head(hidden).values()
    )
    leaves = (hidden, *head.parameters())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    )


def test_from_linear_shares_its_parameters():
    linear = nn.Linear(16, 7)
    head = MRLEHead.from_linear(linear, SIZES)
    assert head.weight is linear.weight and head.bias is linear.bias
    assert sorted(head.state_dict()) == sorted(linear.state_dict())


@pytest.mark.parametrize("kind", [MRLHead, MRLEHead])
def test_a_slice_is_a_copy(kind):
    head = kind(16, 7, SIZES)
    cut = head.slice(8)
    assert type(cut) is nn.Linear and cut.weight.shape == (7, 8)
    cut.weight.data.zero_()
    assert all(p.any() for p in head.parameters())


@pytest.mark.parametrize("sizes", [[], [4, 4], [0, 4], [17]])
def test_sizes_are_checked(sizes):
    with pytest.raises(MatryoshkafyError, match="within 1..16"):
        MRLHead(16, 7, sizes)


def test_unknown_size():
    head = MRLEHead(16, 7, SIZES)
    with pytest.raises(MatryoshkafyError, match="not 5"):
        head.slice(5)
    assert 5 not in head.outputs(torch.zeros(1, 16))
