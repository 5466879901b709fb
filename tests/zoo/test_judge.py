"""The judge itself: a right doll passes, and each check sees a doll broken in its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from tests.zoo import judge as judging
from tests.zoo.judge import MASKED, SLICED, Case, Wrong, judge, snapshot, unchanged
from tests.zoo.registry import Entry, Scale, entry


class Small(nn.Module):
    """A table, a hidden layer with batch norm, classes."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(11, s(8)), nn.Linear(s(8), s(16))
        self.norm, self.out = nn.BatchNorm1d(s(16)), nn.Linear(s(16), 3)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        hidden = self.up(self.embed(ids)) * x
        return self.out(torch.relu(self.norm(hidden.transpose(1, 2)).transpose(1, 2)))


def small_entry() -> Entry:
    table: dict[str, Entry] = {}

    @entry("small", "judge", table=table)
    def make(s: Scale) -> Any:
        ids = torch.arange(12).reshape(3, 4) % 11
        return Small(s).double(), (ids, torch.rand(3, 4, 1, dtype=torch.float64)), {}

    return table["small"]


def case_of(nesting: str) -> Case:
    subject = small_entry()
    model, args, kwargs = subject.build()
    doll = mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting=nesting)
    return Case(subject, model, doll, (args, kwargs))


@pytest.mark.parametrize(("nesting", "checks"), [("sliced", SLICED), ("masked", MASKED)])
def test_a_right_doll_passes_every_check(nesting: str, checks: dict[str, Any]) -> None:
    verdict = judge(small_entry(), nesting)
    assert verdict.status == "right", verdict.checks
    assert set(verdict.checks) == {"convert", "unchanged", *checks}
    assert verdict.share is not None
    assert verdict.share < 0.5


def test_what_float32_magnifies_is_judged_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Entry] = {}

    @entry("magnified", "judge", table=table, rebuilds=False)
    def make(s: Scale) -> Any:
        return nn.Sequential(nn.Linear(4, s(16)), nn.Linear(s(16), 3)), (torch.rand(3, 4),), {}

    def seen(case: Case) -> None:
        wide = next(case.model.parameters()).dtype == torch.float64
        if not wide or always:
            raise Wrong("the answers differ")

    for always, status in ((False, "right"), (True, "wrong")):
        monkeypatch.setitem(SLICED, "identity", seen)
        verdict = judge(table["magnified"], "sliced", ("identity",))
        assert verdict.status == status
        assert ("the answers differ" in verdict.checks.get("float32", "")) is not always


def test_a_save_that_writes_into_the_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    save = mk.save

    def writing(doll: mk.Doll, path: Any) -> Any:
        with torch.no_grad():
            next(doll.parameters()).view(-1)[0] += 1e-3
        return save(doll, path)

    monkeypatch.setattr(mk, "save", writing)
    verdict = judge(small_entry(), "sliced", ["slice"])
    assert verdict.checks["unchanged"].startswith("wrong: the user's"), verdict.checks


def _replace(case: Case, change: Callable[[Any], Any]) -> None:
    """Let the doll answer something else, at full size and at every size."""
    forward, outputs = case.doll.forward, case.doll.outputs
    case.doll.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))
    case.doll.outputs = lambda *args, **kwargs: {
        size: change(value) for size, value in outputs(*args, **kwargs).items()
    }


def other_answer(case: Case) -> None:
    _replace(case, lambda y: y * 1.001)


def lost_gradient(case: Case) -> None:
    _replace(case, lambda y: y.detach() + (y - y.detach()) * 0.5)


def baked_batch(case: Case) -> None:
    _replace(case, lambda y: y[:3])


def baked_length(case: Case) -> None:
    _replace(case, lambda y: y[:, :4])


def baked_values(case: Case) -> None:
    kept: list[Tensor] = []

    def first(y: Tensor) -> Tensor:
        kept.append(y.detach())
        return kept[0] if y.shape == kept[0].shape else y

    _replace(case, first)
    judging.run(case.doll, case.call)


def full_at_every_size(case: Case) -> None:
    forward, sizes = case.doll.forward, case.doll.sizes
    case.doll.outputs = lambda *args, **kwargs: dict.fromkeys(sizes, forward(*args, **kwargs))


def evaluation_for_ever(case: Case) -> None:
    case.doll.train = lambda mode=True: case.doll


def no_gradient_at_all(case: Case) -> None:
    _replace(case, lambda y: y.detach())


BROKEN = {
    "identity": other_answer,
    "gradients": lost_gradient,
    "input": lost_gradient,
    "slice": full_at_every_size,
    "beyond": full_at_every_size,
    "values": baked_values,
    "batch": baked_batch,
    "length": baked_length,
    "training": evaluation_for_ever,
    "step": no_gradient_at_all,
    "saved": other_answer,
}


@pytest.mark.parametrize("check", BROKEN)
def test_each_check_sees_a_doll_broken_in_its_way(check: str) -> None:
    case = case_of("sliced")
    BROKEN[check](case)
    with pytest.raises(Wrong):
        SLICED[check](case)


def test_the_native_check_sees_another_class() -> None:
    case = case_of("sliced")
    with torch.no_grad():
        case.model.up.bias.add_(1.0)

    def other(ratio: float) -> nn.Module:
        class Other(Small):
            def forward(self, ids: Tensor, x: Tensor) -> Tensor:
                return super().forward(ids, x) * 2

        return Other(Scale(ratio)).double()

    odd = Entry("odd", "judge", case.entry.build, other)
    with pytest.raises(Wrong, match="native"):
        judging.native(Case(odd, case.model, case.doll, case.call))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.norm.running_mean.add_(1e-12),
        lambda m: m.embed.weight.data[0].zero_(),
        lambda m: m.norm.train(),
        lambda m: setattr(m, "ready", True),
        lambda m: torch.rand(1),
    ],
    ids=["buffer", "parameter", "mode", "attribute", "random"],
)
def test_any_change_of_the_users_model_is_seen(change: Callable[[Any], Any]) -> None:
    model = small_entry().build()[0]
    before = snapshot(model)
    unchanged(before, model)
    change(model)
    with pytest.raises(Wrong):
        unchanged(before, model)
