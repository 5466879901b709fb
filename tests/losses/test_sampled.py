"""SampledMatryoshkaLoss against torch's cross entropy over the drawn columns of stored scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.losses import MatryoshkaLoss, SampledMatryoshkaLoss

CLASSES = 29


def scorer() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16)
    return nn.Sequential(*parts, nn.Linear(16, CLASSES)).double()


X = torch.randn(12, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.arange(12 * 7).view(12, 7) % CLASSES  # class 0 is ignored, or none is


def sampled(doll: mk.Doll, *, ignored: int = 0, reduction: str = "mean") -> SampledMatryoshkaLoss:
    criterion = nn.CrossEntropyLoss(ignore_index=ignored, reduction=reduction)
    scales = {size: 1 + 4 / size for size in doll.sizes}
    weights = {4: 3.0, 8: 1.0, 16: 0.5}
    draws = torch.Generator().manual_seed(7)
    given = doll.sizes, weights
    return SampledMatryoshkaLoss(criterion, 6, *given, learn_scales=scales, generator=draws)


def by_torch(scores: torch.Tensor, drawn: list[int], *, ignored: int) -> torch.Tensor:
    """The mean over rows of -log softmax over the target and the drawn classes but the target."""
    losses = []
    for row, target in zip(scores.flatten(0, -2), TARGET.flatten().tolist(), strict=True):
        if target != ignored:
            kept = [target, *(n for n in drawn if n != target)]
            losses.append(F.cross_entropy(row[kept][None], torch.tensor([0])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
@pytest.mark.parametrize("ignored", [0, 11, -100])
def test_a_size_is_scored_among_the_drawn_classes(nesting: str, ignored: int) -> None:
    doll = mk.convert(scorer(), (X,), sizes=[4, 8, 16], nesting=nesting)
    loss_of = sampled(doll, ignored=ignored)
    draws = torch.Generator().manual_seed(7)
    others = [n for n in range(CLASSES) if n != ignored]
    drawn = [others[i] for i in torch.randint(len(others), (6,), generator=draws)]
    loss, per_size = loss_of(doll.outputs(X), TARGET, return_per_size=True)
    expected = {
        size: by_torch(scores * loss_of.scales()[size], drawn, ignored=ignored)
        for size, scores in doll.outputs(X).items()
    }
    total = 3 * expected[4] + expected[8] + 0.5 * expected[16]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(per_size, {m: v.detach() for m, v in expected.items()})
    trained = [*doll.parameters(), *loss_of.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(loss, trained), torch.autograd.grad(total, trained)
    )


def test_sums_count_every_row() -> None:
    doll = mk.convert(scorer(), (X,), sizes=[4, 8, 16])
    outputs, rows = doll.outputs(X), int((TARGET != 0).sum())
    summed = sampled(doll, reduction="sum")(outputs, TARGET)
    torch.testing.assert_close(summed, rows * sampled(doll)(outputs, TARGET))


@pytest.mark.parametrize("ignored", [0, 11, CLASSES - 1, -100, CLASSES])
def test_every_class_is_drawn_alike_and_the_ignored_one_never(ignored: int) -> None:
    criterion = nn.CrossEntropyLoss(ignore_index=ignored)
    draws = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        SampledMatryoshkaLoss(criterion, 290_000, generator=draws).others(CLASSES),
        minlength=CLASSES,
    )
    others = [n for n in range(CLASSES) if n != ignored]
    assert counts[others].sum() == 290_000
    share = 290_000 / len(others)
    assert ((counts[others] - share).abs() < 5 * share**0.5).all(), "five standard deviations"


def test_without_negatives_all_classes_are_scored() -> None:
    doll = mk.convert(scorer(), (X,), sizes=[4, 8, 16])
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    outputs = doll.outputs(X)
    torch.testing.assert_close(
        SampledMatryoshkaLoss(criterion, 0)(outputs, TARGET),
        MatryoshkaLoss(criterion)(outputs, TARGET),
    )


def test_a_row_whose_negatives_are_all_its_target_has_gradients() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    doll = mk.convert(model, (X,), sizes=[4, 8, 16])
    criterion = nn.CrossEntropyLoss(ignore_index=0)  # so that class 1 is target and negative
    loss_of = SampledMatryoshkaLoss(criterion, 3, doll.sizes, learn_scales=True)
    loss = loss_of(doll.outputs(X), torch.ones_like(TARGET))
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in loss_of.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in doll.parameters())


def test_what_cannot_be_drawn_is_refused() -> None:
    for criterion in (
        nn.MSELoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(CLASSES)),
        nn.CrossEntropyLoss(reduction="none"),
    ):
        with pytest.raises(MatryoshkafyError, match="any other criterion goes into MatryoshkaLoss"):
            SampledMatryoshkaLoss(criterion, 5)
    with pytest.raises(MatryoshkafyError, match="-1 should be 0 or more"):
        SampledMatryoshkaLoss(nn.CrossEntropyLoss(), -1)
    stored = {4: torch.randn(3, CLASSES), 8: torch.randn(3, CLASSES)}
    with pytest.raises(MatryoshkafyError, match="wants what `doll.outputs` returned"):
        SampledMatryoshkaLoss(nn.CrossEntropyLoss(), 5)(stored, torch.tensor([1, 2, 3]))
