"""distil(): against arithmetic, sizes in turn, resuming to the bit, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import DistilError, Recipe, Term, distil
from matryoshkafy.training.distil import _Run
from matryoshkafy.training.rota import ROTAS, Rota


class Encoder(nn.Module):
    """Embeds a row of tokens; its output nests."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return (h + self.down(torch.relu(self.up(h)))).mean(1)


class Classifier(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def rows(count: int = 48) -> list[Tensor]:
    return list(torch.randint(0, 30, (count, 6), generator=torch.Generator().manual_seed(0)))


def made(model: type[nn.Module] = Encoder) -> tuple[Doll, nn.Module]:
    torch.manual_seed(0)
    built = model()
    teacher = copy.deepcopy(built)
    doll = mk.convert(built, torch.stack(rows(4)), sizes=[4, 8, 16], nesting="sliced")
    return doll, teacher


RECIPE = Recipe(steps=12, batch=16, rate=1e-2, save=5)


@pytest.mark.parametrize("sizes", list(ROTAS))
def test_the_small_sizes_come_nearer_to_the_teacher(sizes: str) -> None:
    doll, teacher = made()
    recipe = Recipe(steps=40, batch=24, rate=1e-2, sizes=sizes)
    before = _apart(doll, teacher)
    report = distil(doll, teacher, rows(), recipe)
    after = _apart(doll, teacher)
    assert after[4] < before[4] and after[8] < before[8], (before, after)
    assert report.steps == 40 and "size" in str(report)
    assert mk.verify(doll, torch.stack(rows(4))).passed


def _apart(doll: Doll, teacher: nn.Module) -> dict[int, float]:
    x = torch.stack(rows())
    with torch.no_grad():
        want = _cosines(teacher(x))
        return {m: float((_cosines(v) - want).square().mean()) for m, v in doll.outputs(x).items()}


def _cosines(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).t()


@pytest.mark.parametrize("kind", ["kl", "mse", "cosine", "similarity"])
def test_the_loss_is_the_formula(kind: str) -> None:
    doll, teacher = made(Classifier)
    x = torch.stack(rows(8))
    run = _Run(doll, teacher, rows(), Recipe(terms=(Term(kind, 2.0, 3.0),)), torch.stack)
    with torch.no_grad():
        student, lesson = doll.outputs(x)[4], teacher(x)
        found = run.loss(4, student, x, run.lessons(torch.arange(8), x))
    wanted = {
        "kl": 9
        * F.kl_div((student / 3).log_softmax(-1), (lesson / 3).softmax(-1), reduction="batchmean"),
        "mse": F.mse_loss(student, lesson),
        "cosine": (1 - F.cosine_similarity(student, lesson)).mean(),
        "similarity": (_cosines(student) - _cosines(lesson)).square().mean(),
    }
    torch.testing.assert_close(found, 2 * wanted[kind], rtol=1e-5, atol=1e-7)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    terms = (Term(), Term("mse"))
    whole, teacher = made()
    distil(whole, teacher, rows(), Recipe(12, 16, 1e-2, save=5, terms=terms))
    first, _ = made()
    # Killed after step 7, saved after step 5.
    with pytest.raises(KeyboardInterrupt):
        distil(
            first,
            teacher,
            _Killed(rows(), 7 * 16 + 2),
            Recipe(12, 16, 1e-2, save=5, terms=terms),
            folder=tmp_path / "run",
        )
    second, _ = made()
    distil(
        second, teacher, rows(), Recipe(12, 16, 1e-2, save=5, terms=terms), folder=tmp_path / "run"
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    again = distil(
        second, teacher, rows(), Recipe(12, 16, 1e-2, save=5, terms=terms), folder=tmp_path / "run"
    )
    assert all(v != v for v in again.last.values())  # no step was left


class _Killed(list):
    """Rows that stop the run when one more than `left` is read."""

    def __init__(self, given: list[Tensor], left: int) -> None:
        super().__init__(given)
        self.left = left

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_outputs_computed_once_teach_as_the_teacher_does() -> None:
    one, teacher = made()
    two, _ = made()
    with torch.no_grad():
        known = teacher(torch.stack(rows()))
    distil(one, teacher, rows(), RECIPE)
    distil(two, known, rows(), RECIPE)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_a_frozen_copy_anchors_the_largest() -> None:
    """At the start the largest size is its own teacher, so nothing moves when it alone learns."""
    doll, _ = made()
    before = {n: t.clone() for n, t in doll.state_dict().items()}
    distil(doll, None, rows(), Recipe(3, 16, 1e-2, decay=0.0, last=1.0))
    moved = max(float((before[n] - t).abs().max()) for n, t in doll.state_dict().items())
    assert moved <= 0.06  # Adam divides a gradient of rounding errors by itself


def test_a_projection_is_learnt_where_widths_differ_and_thrown_away() -> None:
    doll, teacher = made()
    names = set(doll.state_dict())
    run = _Run(doll, teacher, rows(), Recipe(terms=(Term("cosine"),)), torch.stack)
    assert sorted(run.projections) == ["0_4", "0_8"]
    distil(doll, teacher, rows(), Recipe(3, 16, terms=(Term("cosine"),)))
    assert set(doll.state_dict()) == names


def test_rows_are_shared_among_the_sizes() -> None:
    rota = Rota((4, 8, 16), "rows", {4: 2.0, 8: 1.0, 16: 1.0})
    passes = rota.passes(torch.arange(40, 80), 0.5, torch.Generator().manual_seed(0))
    shares = [share for shares in passes for share in shares]
    assert [len(s.rows) for s in shares] == [20, 10, 10]
    assert sorted(torch.cat([s.rows for s in shares]).tolist()) == list(range(40, 80))
    assert sum(s.weight for s in shares) == pytest.approx(1.0)


def test_the_ladder_widens_and_ends_on_the_largest() -> None:
    rota = Rota((4, 8, 16), "all", {}, widen=0.5, last=0.2)
    assert [rota.open(p) for p in (0.0, 0.25, 0.5, 0.7, 0.9)] == [
        [16],
        [8, 16],
        [4, 8, 16],
        [4, 8, 16],
        [16],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(3, 16)}, "3 rows, the data 48"),
        ({"recipe": Recipe(batch=99)}, "do not fill a batch of 99"),
        ({"recipe": Recipe(batch=8, terms=(Term("kl"),))}, "as many logits"),
    ],
)
def test_refusals_say_what_to_do(change: dict, message: str) -> None:
    doll, teacher = made()
    given = {"teacher": teacher, "data": rows(), "recipe": RECIPE} | change
    with pytest.raises(DistilError, match=message):
        distil(doll, **given)


def test_a_teacher_that_shares_its_weights_is_refused() -> None:
    doll, _ = made()
    with pytest.raises(DistilError, match="deep copy"):
        distil(doll, doll, rows(), RECIPE)


@pytest.mark.parametrize(
    "make", [lambda: Term("l3"), lambda: Recipe(sizes="some"), lambda: Recipe(steps=-1)]
)
def test_a_recipe_checks_itself(make: object) -> None:
    with pytest.raises(DistilError, match="expected"):
        make()  # type: ignore[operator]
