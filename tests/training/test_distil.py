"""distil(): against arithmetic, sizes in turn, resuming to the bit, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.batches import moved
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import DistilError, Recipe, Term, distil
from matryoshkafy.training.distil import Rows, Student, _Run
from matryoshkafy.training.rota import ROTAS, Rota
from matryoshkafy.training.rows import alike
from tests.training.runs import Killed


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
    terms = (Term(kind, 2.0, 3.0),)
    run = _Run(Student(doll, teacher), Rows(rows(), torch.stack), Recipe(terms=terms))
    with torch.no_grad():
        student, lesson = doll.outputs(x)[4], teacher(x)
        (found,) = run.taught([4], x, run.lessons(torch.arange(8), x))
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
            Killed(rows(), 7 * 16 + 2),
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
    assert str(again) == "12 steps, all of them done before this call"


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
    recipe = Recipe(terms=(Term("cosine"),))
    run = _Run(Student(doll, teacher), Rows(rows(), torch.stack), recipe)
    assert sorted(run.taught.projections) == ["0_4", "0_8"]
    distil(doll, teacher, rows(), Recipe(3, 16, terms=(Term("cosine"),)))
    assert set(doll.state_dict()) == names


def test_the_teacher_speaks_the_users_order() -> None:
    """An ordered doll at full size agrees with the model it was, so it has nothing to learn."""
    doll, teacher = made()
    mk.order(doll, [torch.stack(rows(8))])
    with torch.no_grad():
        known = teacher(torch.stack(rows()))
    given = Rows(rows(), torch.stack)
    run = _Run(Student(doll, known), given, Recipe(terms=(Term("mse"),)))
    x, first = torch.stack(rows(8)), torch.arange(8)
    found = run.taught([16, 8], x, run.lessons(first, x)).tolist()
    assert found[0] <= 1e-10
    # The projection starts where each unit was: what is missing is the other units.
    order = torch.tensor(doll.plan.order[doll.plan.groups[doll.plan.main].name])
    with torch.no_grad():
        small = doll.outputs(x)[8]
    start = torch.zeros(8, 16).index_copy_(1, order[:8], small)
    assert found[1] == pytest.approx(float(F.mse_loss(start, known[:8])), rel=1e-5)


def test_units_of_a_turned_output_are_not_compared_one_by_one() -> None:
    """A rotated output agrees row by row, not unit by unit: said, not learnt away in silence."""
    doll, teacher = made()
    with torch.no_grad():
        known = teacher(torch.stack(rows()))
    report = mk.rotate(doll, [torch.stack(rows())])
    assert report.rotated
    with pytest.raises(DistilError, match="another basis"):
        distil(doll, known, rows(), Recipe(1, 16, terms=(Term("mse"),)))
    found = distil(doll, report.turn(doll, known), rows(), Recipe(1, 16, terms=(Term("mse"),)))
    assert found.first[16] < 1e-6


def test_rows_of_a_length_learn_together_and_all_of_them() -> None:
    lengths = torch.arange(64).flip(0).tolist()
    found = list(alike(lengths, 8, seed=0, epoch=0))
    assert sorted(torch.cat(found).tolist()) == list(range(64))
    assert all(max(part) - min(part) == 7 for part in (x.tolist() for x in found))
    again = list(alike(lengths, 8, seed=0, epoch=0, start=3))
    assert torch.equal(torch.stack(again), torch.stack(found[3:]))
    other = list(alike(lengths, 8, seed=0, epoch=1))
    assert not torch.equal(torch.stack(other), torch.stack(found))


def test_a_run_by_length_resumes_and_is_watched(tmp_path: Path) -> None:
    lengths = [len(set(row.tolist())) for row in rows()]
    whole, teacher = made()
    seen: list[int] = []
    recipe = Recipe(7, 16, 1e-2, save=3)
    distil(whole, teacher, rows(), recipe, lengths=lengths, watch=seen.append)
    assert seen == [3, 6, 7]
    part, _ = made()
    with pytest.raises(KeyboardInterrupt):
        distil(
            part,
            teacher,
            Killed(rows(), 4 * 16 + 2),
            recipe,
            lengths=lengths,
            folder=tmp_path / "run",
        )
    rest, _ = made()
    distil(rest, teacher, rows(), recipe, lengths=lengths, folder=tmp_path / "run")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name


def test_events_have_a_curve_for_each_size(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    doll, teacher = made()
    distil(doll, teacher, rows(), Recipe(12, 16), events=tmp_path)
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    tags = " ".join(found.Tags()["scalars"])
    assert all(str(size) in tags for size in doll.sizes), tags


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_checkpointed_gradients_are_the_gradients_in_less_memory(nesting: str) -> None:
    model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(16, 16), nn.Tanh())])
    x = torch.randn(64, 16)
    doll = mk.convert(model, x[:2], sizes=[8, 16], nesting=nesting)
    plain, kept = _gradients(doll, x)
    again, less = _gradients(doll.checkpoint_gradients(4), x)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    assert less < 0.5 * kept, (less, kept)
    copied, _ = _gradients(copy.deepcopy(doll), x)
    torch.testing.assert_close(copied, plain)


def _gradients(doll: Doll, x: Tensor) -> tuple[list[Tensor], int]:
    """The gradients of all sizes, and the bytes of activations that the forward kept."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.shape[0] != len(x) else tensor.numel()
        return tensor

    doll.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = sum((out.square().sum() for out in doll.outputs(x).values()), torch.zeros(()))
    total.backward()
    return [p.grad.clone() for p in doll.parameters() if p.grad is not None], kept


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


def test_logits_may_be_picked_by_a_layer_of_their_own() -> None:
    """A kl term has no projection, so its `of` sees outputs alone."""
    doll, teacher = made()
    readout = nn.Linear(16, 5)

    def logits(output: Tensor, batch: object) -> Tensor:
        return nn.functional.linear(output, readout.weight[:, : output.shape[-1]], readout.bias)

    report = distil(doll, teacher, rows(), Recipe(2, batch=16, terms=(Term("kl", of=logits),)))
    assert set(report.last) == {4, 8, 16}


def test_a_batch_is_the_users_own_object_and_follows_the_doll() -> None:
    """A term or a loss may read attributes of a tokenizer's output."""
    encoding = pytest.importorskip("transformers").BatchEncoding({"x": torch.stack(rows(2))})
    doll, _ = made()
    assert moved(encoding, doll) is encoding
    there = moved(encoding, doll.to("meta"))
    assert type(there) is type(encoding) and there.x.device.type == "meta"
    assert encoding.x.device.type == "cpu"


def test_bfloat16_is_autocast_around_float32_weights() -> None:
    doll, teacher = made()
    own, taught, data = copy.deepcopy(doll), copy.deepcopy(teacher), rows()[:16]
    recipe = Recipe(1, 16, terms=(Term("similarity"),), sizes="all", precision="bfloat16")
    report = distil(doll, teacher, data, recipe)
    assert {p.dtype for p in doll.parameters()} == {torch.float32}
    expected = {}
    for half in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs, lesson = own.outputs(torch.stack(data)), taught(torch.stack(data))
            students = [outputs[size] for size in doll.sizes]
        wanted = _cosines(lesson.float())
        found = [_cosines(x.float()) for x in students]
        expected[half] = [float((x - wanted).square().mean()) for x in found]
    found = [report.first[size] for size in doll.sizes]
    assert found == pytest.approx(expected[True], rel=1e-4)
    errors = [
        sum(abs(a - b) for a, b in zip(found, expected[h], strict=True)) for h in (True, False)
    ]
    assert errors[0] < errors[1]
