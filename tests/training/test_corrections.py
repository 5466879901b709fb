"""distil(corrections=): each size learns a few numbers of its own, and a slice holds them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.training import Corrections, DistilError, Recipe, Term, distil
from matryoshkafy.training.live_corrections import LiveCorrections
from matryoshkafy.units.norm_scales import NormScales, norm_scales
from tests.training.runs import Killed


class Stream(nn.Module):
    """A residual stream with attention, whose queries, keys and values are laid one after another,
    and a layer that is used twice; its output nests.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.outer = nn.Embedding(30, 16), nn.LayerNorm(16), nn.RMSNorm(16)
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.again = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.again.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.mix(h, h, h, need_weights=False)[0]
        h = h + self.down(torch.relu(self.up(self.inner(h))))
        return self.outer(h + self.again(torch.tanh(self.up(h)))).mean(1)


ROWS = list(torch.randint(0, 30, (48, 6), generator=torch.Generator().manual_seed(0)))
X = torch.stack(ROWS[:8])
RECIPE = Recipe(steps=12, batch=16, rate=1e-2, save=5, terms=(Term("similarity"),))


def made() -> Doll:
    torch.manual_seed(0)
    return mk.convert(Stream(), X, sizes=[4, 8, 16], nesting="sliced")


def drawn(doll: Doll, rank: int = 3) -> Corrections:
    """Corrections that change everything that they may."""
    start, draw = Corrections.start(doll, rank), torch.Generator().manual_seed(7)
    own = {
        size: {
            name: tuple(0.3 * torch.randn(t.shape, generator=draw) for t in each)
            for name, each in start.at(size).items()
        }
        for size in doll.sizes[:-1]
    }
    return Corrections(start.sizes, own)


def corrected(size: int, own: Corrections) -> Doll:
    """The doll of the full model with the corrections of a size added by hand."""
    model = Stream()
    model.load_state_dict(made().state_dict())
    with torch.no_grad():
        for name, each in own.at(size).items():
            tensor = model.get_parameter(name)
            if len(each) == 1:
                tensor[: len(each[0])] += each[0]
            else:
                out, into = each
                tensor[: len(out), : into.shape[1]] += torch.einsum("ir,rj->ij", out, into)
    return mk.convert(model, X, sizes=[4, 8, 16], nesting="sliced")


@pytest.mark.parametrize("size", [4, 8])
def test_a_slice_is_that_of_the_model_with_them_added_by_hand(size: int) -> None:
    doll = made()
    own = drawn(doll)
    small, expected = own.slice(doll, size), mk.slice(corrected(size, own), size)
    assert {n: t.shape for n, t in state_of(small).items()} == {
        n: t.shape for n, t in state_of(mk.slice(doll, size)).items()
    }
    for name, tensor in state_of(small).items():
        torch.testing.assert_close(tensor, state_of(expected)[name])
    assert not torch.allclose(small(X), mk.slice(doll, size)(X))


@pytest.mark.parametrize("size", [4, 8])
def test_values_and_gradients_while_they_learn_are_those_of_the_slice(size: int) -> None:
    doll = made()
    own = drawn(doll)
    live, small = LiveCorrections(doll, own), own.slice(doll, size)
    with live.applied(size):
        found = doll.outputs(X)[size]
    expected = small(X)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: t.grad for name, t in state_of(small).items()}
    for name, each in live.at(size).items():
        grad = grads[name]
        assert grad is not None
        if len(each) == 1 and len(each[0]) == len(grad):
            torch.testing.assert_close(each[0].grad, grad)
        if len(each) == 2 and (len(each[0]), each[1].shape[1]) == grad.shape:
            torch.testing.assert_close(each[0].grad, grad @ each[1].detach().t())
            torch.testing.assert_close(each[1].grad, each[0].detach().t() @ grad)
    other = {4: 8, 8: 4}[size]
    assert all(t.grad is None for each in live.at(other).values() for t in each)
    shared = state_of(doll)["up.weight"].grad
    assert shared is not None
    m, n = small.get_parameter("up.weight").shape
    torch.testing.assert_close(shared[:m, :n], grads["up.weight"])


def test_what_has_corrections() -> None:
    start = Corrections.start(made(), rank=2)
    # Rows of the table are no width; one of two tied weights has them, for both.
    matrices = {name for name, each in start.at(4).items() if len(each) == 2}
    assert matrices == {"mix.in_proj_weight", "mix.out_proj.weight", "up.weight", "down.weight"}
    vectors = {name for name, each in start.at(4).items() if len(each) == 1}
    assert vectors == {"mix.in_proj_bias", "mix.out_proj.bias", "up.bias", "down.bias",
                       "again.bias", "inner.weight", "inner.bias", "outer.weight"}  # fmt: skip
    assert [t.shape for t in start.at(4)["up.weight"]] == [(8, 2), (2, 4)]
    assert not start.at(16) and start.numbers(16) == 0
    assert all(len(each) == 1 for each in Corrections.start(made(), rank=0).at(8).values())
    assert Corrections.start(made(), rank=0).numbers(8) < start.numbers(8)


def test_a_start_changes_nothing_or_begins_with_factors() -> None:
    doll = made()
    before = doll.outputs(X)[4].detach()
    torch.testing.assert_close(Corrections.start(doll).slice(doll, 4)(X), before)
    factors = norm_scales(doll, [X])
    expected = factors.fold(mk.slice(doll, 4), 4)(X)
    torch.testing.assert_close(Corrections.start(doll, 2, factors).slice(doll, 4)(X), expected)
    assert not torch.allclose(expected, before)


def test_the_largest_size_and_the_doll_afterwards_are_without() -> None:
    doll = made()
    before, tensors, own = doll.outputs(X), state_of(doll), drawn(doll)
    values = {m: before[m].detach().clone() for m in doll.sizes}
    for contexts in (LiveCorrections(doll, own).applied, lambda size: own.applied(doll, size)):
        with contexts(16):
            assert torch.equal(doll.outputs(X)[16], values[16])
        with pytest.raises(ZeroDivisionError), contexts(8):
            assert not torch.allclose(doll.outputs(X)[8], values[8])
            _ = 1 / 0
        assert all(torch.equal(doll.outputs(X)[m], values[m]) for m in doll.sizes)
        assert all(tensors[name] is t for name, t in state_of(doll).items())


def test_they_learn_and_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    ends: list[tuple[Corrections | None, dict[str, Tensor]]] = []
    for stops in ((12,), (5, 12)):
        doll, folder = made(), tmp_path / str(len(stops))
        teacher, start = copy.deepcopy(doll).eval(), Corrections.start(doll)
        for steps in stops:
            again = doll if steps == stops[0] else made()
            # A look at the first eight comes before the first step.
            given = ROWS if steps == 12 else Killed(ROWS, 8 + 5 * 16)
            try:
                report = distil(again, teacher, given, RECIPE, folder=folder, corrections=start)
            except KeyboardInterrupt:
                continue
            ends.append((report.corrections, again.state_dict()))
    (one, first), (other, second) = ends
    assert one is not None and other is not None
    assert _equal(one, other) and not _equal(one, start)
    assert all(torch.equal(t, second[n]) for n, t in first.items())


def _equal(one: Corrections, other: Corrections) -> bool:
    pairs = (
        torch.equal(a, b)
        for size in one.sizes
        for name, own in one.at(size).items()
        for a, b in zip(own, other.at(size)[name], strict=True)
    )
    return one.sizes == other.sizes and all(pairs)


def test_they_come_back_from_a_file(tmp_path: Path) -> None:
    own = drawn(made())
    own.save(tmp_path / "own.safetensors")
    assert _equal(own, Corrections.load(tmp_path / "own.safetensors"))
    assert list(tmp_path.iterdir()) == [tmp_path / "own.safetensors"]


DAMAGES = ["missing", "cut", "foreign", "sizes", "5/left/up.weight", "4/right/up.weight",
           "4/middle/up.weight", "4/left"]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_file_is_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "own.safetensors"
    if damage == "cut":
        drawn(made()).save(file)
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "foreign":
        save_file({"weight": torch.ones(2)}, file)
    elif damage in ("5/left/up.weight", "4/right/up.weight", "4/middle/up.weight", "4/left"):
        save_file({damage: torch.ones(2), "sizes": torch.tensor([4, 8, 16])}, file)
    elif damage == "sizes":
        save_file({"sizes": torch.ones(2, 2)}, file)
    with pytest.raises(DistilError, match="holds no corrections"):
        Corrections.load(file)


def test_those_of_another_doll_are_refused() -> None:
    doll = made()
    start = Corrections.start(doll)
    masked = mk.convert(Stream(), X, sizes=[4, 8, 16], nesting="masked")
    other = mk.convert(Stream(), X, sizes=[4, 16], nesting="sliced")
    for wrong in (masked, other):
        with pytest.raises(DistilError, match="of this doll in sliced nesting"):
            distil(wrong, None, ROWS, RECIPE, corrections=start)
    alone = {size: {"up.weight": start.at(size)["up.weight"][:1]} for size in (4, 8)}
    wide = {size: {"up.bias": (torch.ones(32),)} for size in (4, 8)}
    for own in (alone, wide, {4: {"other": (torch.ones(4),)}, 8: {}}):
        with pytest.raises(DistilError, match="of another shape at size 4"):
            Corrections(start.sizes, own).slice(doll, 8)
    with pytest.raises(DistilError, match="a masked doll of"):
        Corrections.start(masked)
    with pytest.raises(DistilError, match="with scales of"):
        Corrections.start(doll, scales=NormScales((4, 16), {}))
    with pytest.raises(DistilError, match="expected one of 4, 8, 16"):
        start.slice(doll, 5)
    with pytest.raises(DistilError, match="checkpoint_gradients"):
        distil(doll.checkpoint_gradients(3), None, ROWS, RECIPE, corrections=start)
