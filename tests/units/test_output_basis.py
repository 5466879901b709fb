"""rotate() with scope="output": the returned vector in its principal directions, by NumPy's SVD."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.units.permute import OrderError
from tests.small_models import WIDTH, sentence_encoder


def rows(seed: int = 0, n: int = 64) -> Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


class Tower(nn.Module):
    """A hidden layer, and a linear that writes the vector; `last` is what comes behind it."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.out = nn.Linear(12, 24), nn.Linear(24, WIDTH)
        self.last = nn.Identity() if last is None else last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.out(torch.relu(self.up(x))))


class Unit(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


class Pair(nn.Module):
    """Two towers whose vectors meet in a product, as CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Unit(), Unit()
        nn.init.normal_(self.text.out.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = self.image(x), self.text(x + 1)
        return {"logits": a @ b.t(), "image_embeds": a, "text_embeds": b}


class Joined(Tower):
    """Half of the vector is of another layer: no one axis."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.up(x)], -1)


class Judged(Tower):
    """A classifier reads the vector through a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = super().forward(x)
        return {"embedding": h, "logits": self.head(torch.relu(h))}


def made(model: nn.Module) -> Doll:
    return mk.convert(model.eval(), rows(), sizes=[4, 8, WIDTH], scope="output")


def gained() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("kind", [Tower, Unit])
def test_its_first_units_hold_what_the_first_singular_directions_hold(
    kind: type[nn.Module],
) -> None:
    """Eckart and Young 1936: no other k directions hold more of the vectors' energy."""
    model = kind()
    doll = made(model)
    before = doll(rows()).detach()
    report = mk.rotate(doll, [rows()[:32], rows()[32:]])
    after = doll(rows()).detach()
    energy = torch.linalg.svdvals(before.double()).square()
    shares = energy.cumsum(0) / energy.sum()
    for size in (4, 8, WIDTH):
        held = after[:, :size].square().sum() / after.square().sum()
        assert float(held) == pytest.approx(float(shares[size - 1]), rel=1e-4)
    assert report.rotated[0].kept == pytest.approx([float(shares[s - 1]) for s in (4, 8, WIDTH)])
    torch.testing.assert_close(after @ after.t(), before @ before.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(report.put_back(doll, after), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.turn(doll, before), after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(rows()), after)  # the user's own weights hold it
    assert report.error <= 1e-5 and "output" in str(report) and "ordered" not in str(report)


def test_slices_and_files_hold_the_turned_vector(tmp_path: Path) -> None:
    doll = made(Unit())
    mk.rotate(doll, [rows()])
    wanted = F.normalize(doll(rows(1))[:, :4], dim=-1)
    torch.testing.assert_close(mk.slice(doll, 4)(rows(1)), wanted)
    mk.save(doll, tmp_path / "doll")
    torch.testing.assert_close(mk.load(tmp_path / "doll", size=4)(rows(1)), wanted)
    assert mk.verify(doll, rows()).passed


def test_two_towers_turn_alike_and_their_product_stays() -> None:
    doll = made(Pair())
    before = {name: value.detach() for name, value in doll(rows()).items()}
    report = mk.rotate(doll, [rows()])
    after = doll(rows())
    torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after["text_embeds"], before["text_embeds"], atol=0.1)
    back = report.put_back(doll, after)
    for name, value in before.items():
        torch.testing.assert_close(back[name], value, rtol=1e-4, atol=1e-5)


def test_a_layer_norm_without_gain_keeps_its_mean() -> None:
    doll = made(Tower(nn.LayerNorm(WIDTH, elementwise_affine=False)))
    before = doll(rows()).detach()
    report = mk.rotate(doll, [rows()])
    assert report.rotated[0].mean
    torch.testing.assert_close(
        report.put_back(doll, doll(rows()).detach()), before, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Tower(nn.ReLU()), "relu acts on each of its units"),
        (lambda: Tower(gained()), "the gain of the last norm stands at the output"),
        (lambda: Tower(nn.BatchNorm1d(WIDTH)), "batch_norm acts on each of its units"),
        (lambda: nn.Sequential(nn.Identity()), "stays whole"),
        (lambda: Joined(), "put together of several"),
        (lambda: Judged(), "relu acts on each of its units"),
    ],
)
def test_what_stands_in_the_way_is_refused_and_nothing_changes(model: Any, why: str) -> None:
    user = model()
    joined = 40 if isinstance(user, Joined) else WIDTH
    x = torch.randn(8, WIDTH) if isinstance(user, nn.Sequential) else rows()
    doll = mk.convert(user.eval(), x, sizes=[4, joined], scope="output")
    kept = copy.deepcopy(user.state_dict())
    with pytest.raises(OrderError, match=why) as found:
        mk.rotate(doll, [x])
    assert "torch.nn.Linear(width, width)" in str(found.value)
    for name, tensor in user.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_order_says_who_turns_an_output() -> None:
    with pytest.raises(OrderError, match="rotate turns the output"):
        mk.order(made(Tower()), [rows()])


def test_what_the_path_does_not_read_is_refused_by_name() -> None:
    model = Tower()
    model.pooler = nn.Linear(WIDTH, WIDTH)
    doll = made(model)
    with pytest.raises(OrderError, match="pooler.weight"):
        mk.rotate(doll, [rows()])
    assert mk.rotate(doll, [rows()], unread="leave").rotated


class TestAddDense:
    """A sentence encoder behind whose last gain only a matrix can hold a rotation."""

    @pytest.fixture
    def encoder(self, tmp_path: Path) -> Any:
        model = sentence_encoder(tmp_path)
        modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
        model.append(modules.Normalize())
        return model

    def test_it_changes_nothing_and_then_holds_the_rotation(
        self, encoder: Any, tmp_path: Path
    ) -> None:
        from sentence_transformers import SentenceTransformer

        texts = ["one two", "three four five", "five", "two five three", "one", "four four"]
        before = torch.tensor(encoder.encode(texts))
        assert mk.add_dense(encoder) == "2.linear.weight"
        assert [type(part).__name__ for part in encoder][-2:] == ["Dense", "Normalize"]
        torch.testing.assert_close(torch.tensor(encoder.encode(texts)), before)
        doll = mk.convert(encoder, sizes=[4, 8, WIDTH], scope="output")
        batch = dict(encoder.preprocess(texts))
        mk.rotate(doll, [((batch,), {})], unread="leave")
        encoder.save_pretrained(str(tmp_path / "turned"))
        whole = SentenceTransformer(str(tmp_path / "turned"), device="cpu")
        after = torch.tensor(whole.encode(texts))
        torch.testing.assert_close(after @ after.t(), before @ before.t(), rtol=1e-4, atol=1e-5)
        energy = torch.linalg.svdvals(before.double()).square()
        held = float(after[:, :4].square().sum() / after.square().sum())
        assert held == pytest.approx(float(energy[:4].sum() / energy.sum()), rel=1e-4)
        short = SentenceTransformer(str(tmp_path / "turned"), device="cpu", truncate_dim=4)
        torch.testing.assert_close(torch.tensor(short.encode(texts)), after[:, :4])

    def test_other_models_are_told_what_to_do(self) -> None:
        with pytest.raises(OrderError, match="torch.nn.Sequential"):
            mk.add_dense(Tower())
