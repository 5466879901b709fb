"""distil(scales=): each size learns with factors of its norms, and they learn too."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.training import DistilError, Recipe, Term, distil
from matryoshkafy.training.live_scales import LiveScales
from matryoshkafy.units.norm_scales import NormScales, norm_scales


class Stream(nn.Module):
    """A residual stream with two norms; its output nests."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.outer = nn.Embedding(30, 16), nn.LayerNorm(16), nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.outer(h + self.down(torch.relu(self.up(self.inner(h))))).mean(1)


ROWS = list(torch.randint(0, 30, (48, 6), generator=torch.Generator().manual_seed(0)))
X = torch.stack(ROWS[:8])
RECIPE = Recipe(steps=12, batch=16, rate=1e-2, save=5, terms=(Term("similarity"),))


def made() -> tuple[Doll, NormScales]:
    torch.manual_seed(0)
    doll = mk.convert(Stream(), X, sizes=[4, 8, 16], nesting="sliced")
    return doll, norm_scales(doll, [X])


def test_values_and_gradients_are_those_of_the_scaled_slice() -> None:
    doll, start = made()
    small, live = start.fold(mk.slice(doll, 4), 4), LiveScales(doll, start)
    with live.applied(4):
        found = doll.outputs(X)[4]
    expected = small(X)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gains = state_of(small)
    for name, factors in zip(live.gains, live.factors, strict=True):
        # The slice's gain is the doll's times the factor.
        gain, grad = gains[name].detach(), gains[name].grad
        assert grad is not None and factors.grad is not None
        whole = gain / factors[0].detach()
        torch.testing.assert_close(factors.grad[0], (grad * whole).sum())
        assert factors.grad[1] == 0
        own = state_of(doll)[name].grad
        assert own is not None
        torch.testing.assert_close(own[:4], grad * factors[0].detach())


def test_the_largest_size_and_the_doll_afterwards_are_without() -> None:
    doll, start = made()
    before, own = doll.outputs(X), state_of(doll)
    values, live = {m: before[m].detach() for m in doll.sizes}, LiveScales(doll, start)
    with live.applied(16):
        assert torch.equal(doll.outputs(X)[16], values[16])
    with pytest.raises(ZeroDivisionError), live.applied(8):
        assert not torch.allclose(doll.outputs(X)[8], values[8])
        _ = 1 / 0
    assert all(torch.equal(doll.outputs(X)[m], values[m]) for m in doll.sizes)
    assert all(own[name] is t for name, t in state_of(doll).items())


def test_they_learn_and_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    ends: list[tuple[NormScales | None, dict[str, Tensor]]] = []
    for stops in ((12,), (5, 12)):
        doll, start = made()
        teacher, folder = copy.deepcopy(doll).eval(), tmp_path / str(len(stops))
        for steps in stops:
            again, found = (doll, start) if steps == stops[0] else made()
            recipe = Recipe(steps=12, batch=16, rate=1e-2, save=5, terms=RECIPE.terms)
            given = ROWS if steps == 12 else _Stopping(ROWS, 5 * 16)
            try:
                report = distil(again, teacher, given, recipe, folder=folder, scales=found)
            except KeyboardInterrupt:
                continue
            ends.append((report.scales, again.state_dict()))
    (one, first), (other, second) = ends
    assert one is not None and other is not None and one == other != start
    assert all(v[-1] == 1.0 for v in one.factors.values())
    assert all(torch.equal(t, second[n]) for n, t in first.items())


class _Stopping(list[Tensor]):
    """Rows that run out: as a killed run."""

    def __init__(self, rows: list[Tensor], left: int) -> None:
        super().__init__(rows)
        self.left = left + 8  # a look at the first eight comes before the first step

    def __getitem__(self, at: object) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(at)  # type: ignore[call-overload, no-any-return]


def test_scales_of_another_doll_are_refused() -> None:
    doll, start = made()
    masked = mk.convert(Stream(), X, sizes=[4, 8, 16], nesting="masked")
    other = mk.convert(Stream(), X, sizes=[4, 16], nesting="sliced")
    for wrong in (masked, other):
        with pytest.raises(DistilError, match="of this doll in sliced nesting"):
            distil(wrong, None, ROWS, RECIPE, scales=start)
    with pytest.raises(DistilError, match="checkpoint_gradients"):
        distil(doll.checkpoint_gradients(3), None, ROWS, RECIPE, scales=start)
