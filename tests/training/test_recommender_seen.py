"""The benchmark's loss against seen items, beside torch's over adjusted scores."""

import math

import pytest
import torch
from torch.nn import functional

import matryoshkafy as mk
from tests.benchmarks.recommender_models import sasrec
from tests.benchmarks.recommender_seen import UnseenLoss, seen_items

SIZES, ITEMS, TIMES = [4, 8], 12, 5.0


def test_what_each_position_knows() -> None:
    history = torch.tensor([[0, 7, -1, 3]])

    causal = seen_items(history, causal=True)
    whole = seen_items(history, causal=False)

    assert causal.tolist() == [[[0, 0, 0, 0], [0, 7, 0, 0], [0, 7, 0, 0], [0, 7, 0, 3]]]
    assert whole.tolist() == [[[0, 7, 0, 3]] * 4]


@pytest.mark.parametrize("nesting", ("masked", "sliced"))
def test_the_loss_and_gradients_are_those_of_adjusted_scores(nesting: str) -> None:
    torch.manual_seed(0)
    model = sasrec(ITEMS, 8, 6).double().eval()
    ids = torch.stack([torch.randperm(ITEMS - 1)[:7] + 1 for _ in range(5)])
    ids[0, :3], ids[1, :5] = 0, 0
    inputs, targets = ids[:, :-1], torch.where(ids[:, :-1] > 0, ids[:, 1:], 0)
    targets[2, 3] = inputs[2, 1]  # bought again: not counted against itself
    doll = mk.convert(model, (inputs,), sizes=SIZES, nesting=nesting).eval()
    weights, scales = {4: 0.5, 8: 2.0}, {4: 3.0, 8: 0.7}
    loss = UnseenLoss(SIZES, TIMES, weights, scales).double()
    seen = seen_items(inputs, causal=True)

    found = loss(doll.outputs(inputs), targets, seen)
    assert loss.log_scales is not None
    learnt = [*doll.parameters(), loss.log_scales]
    gradients = torch.autograd.grad(found, learnt)

    counted = torch.zeros(*inputs.shape, ITEMS, dtype=torch.bool).scatter_(2, seen, True)
    counted[..., 0] = False
    counted.scatter_(2, targets[..., None], False)
    outputs, scaled = doll.outputs(inputs), loss.scales()
    wanted = sum(
        weights[size]
        * functional.cross_entropy(
            (outputs[size] * scaled[size] + counted * math.log(TIMES)).flatten(0, 1),
            targets.flatten(),
            ignore_index=0,
        )
        for size in SIZES
    )
    assert isinstance(wanted, torch.Tensor)
    expected = torch.autograd.grad(wanted, learnt)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_what_has_no_target_counts_nothing_however_large_its_scores() -> None:
    table = torch.eye(4)[1:].repeat(2, 1).requires_grad_()
    hidden = torch.tensor([[1.0, 0, 0, 0], [500.0, 500, 500, 500]], requires_grad=True)
    loss = UnseenLoss([4], TIMES, {4: 1.0}, {4: 1.0})

    found = loss.mean(hidden, table, None, torch.tensor([2, 0]), torch.tensor([[1], [3]]))
    found.backward()

    # All six scores are 0; item 1 is seen.
    torch.testing.assert_close(found.item(), math.log(6 + TIMES - 1))
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert table.grad is not None and table.grad.isfinite().all()
