"""Replayed: its steps are the optimizer's own; what a CUDA graph adds is in tests/test_gpu.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from matryoshkafy.training import Replayed


def batches() -> list[tuple[Tensor, dict[str, Tensor]]]:
    source = torch.Generator().manual_seed(0)
    drawn = (torch.randn(4, 3, generator=source).double() for _ in range(10))
    return [(x, {"y": next(drawn)}) for x in (next(drawn) for _ in range(5))]


@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_steps_are_those_of_the_optimizer(clip: float) -> None:
    torch.manual_seed(0)
    model, rates = nn.Linear(3, 3).double(), [0.1, 0.05, 0.2, 0.1, 0.1]
    plain = copy.deepcopy(model)

    def backward(x: Tensor, named: dict[str, Tensor]) -> Tensor:
        loss = (model(x) - named["y"]).square().mean()
        loss.backward()
        return loss.detach()

    step = Replayed(backward, torch.optim.SGD(model.parameters(), lr=1.0), clip)
    for rate, (x, named) in zip(rates, batches(), strict=True):
        step.set_rates([rate])
        found = step(x, named)
        wanted = (plain(x) - named["y"]).square().mean()
        grads = torch.autograd.grad(wanted, list(plain.parameters()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(plain.parameters(), grads, strict=True):
                p -= rate * g * min(1.0, clip / (float(norm) + 1e-6))
        torch.testing.assert_close(found, wanted.detach())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
