"""order(): the law on the zoo, the scores against arithmetic, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.axes.dims import Nested, Sum
from matryoshkafy.axes.dims import kept as kept_indices
from matryoshkafy.axes.dims import size as size_of
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.units.order import order
from matryoshkafy.units.permute import (
    OrderError,
    inverse,
    moved,
    owners,
    permute,
    positions,
    users_order,
)
from matryoshkafy.units.report import cka
from matryoshkafy.units.scores import _removal
from tests.units.laws import measure, orders_of
from tests.zoo.registry import entries

FAMILIES = "bert gpt2 llama_gqa t5 mamba timm_resnet timm_mobilenetv3 sasrec lru_complex".split()
# Groups that cannot move, and the word of the reason.
KEPT = {"bloom": "meaning"}
DIMS = [
    (Nested(0, 5),),
    (3, Nested(0, 5), 2),
    (Sum(((Nested(0, 5),), (Nested(1, 4), 2), (3,))),),
    (2, Sum(((Nested(0, 5), 2), (Nested(0, 5),))), 3),
]


class Block(nn.Module):
    """A residual block with a wide hidden layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(h + self.down(torch.relu(self.up(self.norm(h)))))


class Rounded(nn.Module):
    """Large terms that cancel: what float32 rounds of its output depends on the units' order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.up.bias += 1e4
            self.down.weight[:, 8:] = -self.down.weight[:, :8]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Pooled(Block):
    """Its pooler is not read by forward."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(8, 8)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(seed))


def made(model: nn.Module | None = None, **options: object) -> Doll:
    torch.manual_seed(0)
    options = {"sizes": [2, 4, 8], "nesting": "sliced"} | options
    return mk.convert(Block() if model is None else model, tokens(), **options)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FAMILIES, *KEPT])
def test_the_full_model_stays_the_same_function(name: str) -> None:
    pytest.importorskip("transformers")
    (entry,) = entries([name])
    row = measure(entry)
    assert row.status == "ok", row.message
    assert row.output <= 1e-5 and row.gradient <= 1e-5, row
    assert all(KEPT.get(name, "no group") in why for why in row.kept), row.kept
    assert len(row.kept) < row.groups


@pytest.mark.parametrize("by", ["activation", "outgoing", "contribution", "taylor"])
def test_every_score_keeps_function_and_laws(by: str) -> None:
    doll = made()
    before = doll(tokens(3)).detach()
    loss = (lambda out, batch: out.square().mean()) if by == "taylor" else None
    report = order(doll, [tokens(1), tokens(2)], by=by, loss=loss)
    torch.testing.assert_close(doll(tokens(3)).detach(), before, rtol=1e-5, atol=1e-5)
    assert mk.verify(doll, tokens()).passed
    assert report.error <= 1e-5 and not any(g.kept for g in report.groups)
    for group in report.groups:
        assert all(a >= b - 1e-6 for a, b in zip(group.after, group.before, strict=True))


def test_rounding_does_not_pass_for_meaning() -> None:
    torch.manual_seed(0)
    model, rows = Rounded(), torch.randn(32, 8)
    doll = mk.convert(model, (rows,), sizes="4,16", nesting="sliced")
    before = copy.deepcopy(model).double()(rows.double())
    report = order(doll, [rows])
    assert report.error > 1e-5
    assert [group.kept for group in report.groups] == [""]
    torch.testing.assert_close(model.double()(rows.double()), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", DIMS)
def test_positions_move_whole_units(dim: tuple) -> None:
    """The kept indices of a permuted dim belong to the chosen units, in every factor."""
    orders = {0: torch.tensor([3, 1, 4, 0, 2]), 1: torch.tensor([2, 0, 3, 1])}
    index = positions(dim, orders)
    assert sorted(index.tolist()) == list(range(size_of(dim)))
    for group, order_ in orders.items():
        old, new = owners(dim, group)[index], owners(dim, group)
        assert torch.equal(old[new >= 0], order_[new[new >= 0]])
    back = positions(dim, inverse(orders))
    assert torch.equal(index[back], torch.arange(size_of(dim)))
    widths = (2, 3)
    rows = [i for a, b in kept_indices(dim, widths) for i in range(a, b)]
    assert set(owners(dim, 0)[index[rows]].tolist()) <= {-1, 3, 1}


def test_the_most_active_units_come_first() -> None:
    """Hidden units scaled up, their readers scaled down: the activation says which they are."""
    doll = made()
    model = doll._trace.root
    loud = [13, 2, 7]
    with torch.no_grad():
        for i, unit in enumerate(loud):
            model.up.weight[unit] *= 1000 * (3 - i)
            model.up.bias[unit] = 1000.0 * (3 - i)
            model.down.weight[:, unit] /= 1000 * (3 - i)
    report = order(doll, [tokens(1)])
    hidden = next(i for i, g in enumerate(report.groups) if g.units == 16)
    assert report.orders[hidden] is not None
    assert list(report.orders[hidden][:3]) == loud


def test_activation_is_minitrons_formula() -> None:
    """sqrt(sum over samples of (mean over positions |x|) ** 2), at the input of the reader."""
    doll = made()
    reference = doll._trace.root
    x = tokens(1)
    with torch.no_grad():
        h = reference.table.weight[x]
        n = torch.layer_norm(h, [8], reference.norm.weight, reference.norm.bias)
        hidden = torch.relu(n @ reference.up.weight.t() + reference.up.bias)
        score = hidden.abs().mean(1).square().sum(0).sqrt()
    report = order(doll, [x])
    at = next(i for i, g in enumerate(report.groups) if g.units == 16)
    assert report.orders[at] == tuple(score.argsort(descending=True, stable=True).tolist())


def test_padding_does_not_count() -> None:
    """Scores of padded rows with their mask are those of the rows without padding."""

    class Masked(Block):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids) * attention_mask[..., None]

    ids = tokens(1)
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.full((6, 3), 10)], 1)
    both = {"input_ids": padded, "attention_mask": torch.cat([mask, torch.zeros(6, 3).long()], 1)}
    found = []
    for batch in ({"input_ids": ids, "attention_mask": mask}, both):
        torch.manual_seed(0)
        doll = mk.convert(Masked(), (), batch, sizes=[2, 4, 8], nesting="sliced")
        found.append(order(doll, [batch]).orders)
    assert found[0] == found[1]


def test_hidden_layers_alone_are_ordered() -> None:
    doll = made(scope="ffn", sizes=[0.25, 0.5, 1.0])
    before = doll(tokens(3)).detach()
    report = order(doll, [tokens(1)])
    assert [g.units for g in report.groups] == [16] and not report.groups[0].kept
    torch.testing.assert_close(doll(tokens(3)).detach(), before, rtol=1e-5, atol=1e-5)


def test_removal_is_the_greedy_search() -> None:
    """Against a search that tries every unit in every round."""
    torch.manual_seed(0)
    x, w = torch.randn(50, 6), torch.randn(4, 6)
    removed: list[int] = []
    for _ in range(6):
        rest = [j for j in range(6) if j not in removed]
        errors = [
            float((x[:, [*removed, j]] @ w[:, [*removed, j]].t()).square().sum()) for j in rest
        ]
        removed.append(rest[min(range(len(rest)), key=errors.__getitem__)])
    rounds = _removal((x.t() @ x) * (w.t() @ w))
    assert torch.argsort(rounds).tolist() == removed


def test_a_wrong_permutation_is_seen() -> None:
    """Move one tensor without the others: the law must fail, or it measures nothing."""
    doll = made()
    before = doll(tokens()).detach()
    orders = {g: torch.randperm(group.size) for g, group in enumerate(doll.plan.groups)}
    permute({"up.weight": doll._trace.root.up.weight}, doll.plan, orders)
    assert not torch.allclose(doll(tokens()).detach(), before, atol=1e-3)


def test_embeddings_are_put_back() -> None:
    class Encoder(Block):
        def __init__(self) -> None:
            super().__init__()
            del self.head

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x)
            return h + self.down(torch.relu(self.up(self.norm(h))))

    doll = made(Encoder())
    before = doll(tokens()).detach()
    report = order(doll, [tokens(1)])
    after = doll(tokens()).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(report.put_back(doll, after), before, rtol=1e-5, atol=1e-5)
    half = mk.slice(doll, 4)(tokens()).detach()
    units = report.units(doll, 4)
    assert len(units) == 4 and half.shape[-1] == 4
    assert list(units) == orders_of(report)[doll.plan.main][:4].tolist()


def test_the_plan_says_where_the_units_stand(tmp_path: Path) -> None:
    """Ordered twice, saved and loaded: outputs come back in the user's own order."""

    class Encoder(Block):
        def __init__(self) -> None:
            super().__init__()
            del self.head

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x)
            return h + self.down(torch.relu(self.up(self.norm(h))))

    doll = made(Encoder())
    before, names = doll(tokens()).detach(), {g.name for g in doll.plan.groups}
    assert not doll.plan.order
    order(doll, [tokens(1)])
    order(doll, [tokens(2)], by="outgoing")
    assert set(doll.plan.order) == names
    mk.save(doll, tmp_path / "doll")
    loaded = mk.load(tmp_path / "doll")
    assert loaded.plan.order == doll.plan.order
    for one in (doll, loaded):
        found = users_order(one, one(tokens()).detach())
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)
    assert mk.slice(doll, 4).meta["matryoshka"][1].order == doll.plan.order


def test_unread_parameters_are_refused_or_left_and_said() -> None:
    doll = made(Pooled())
    old = doll._trace.root.pooler.weight.clone()
    with pytest.raises(OrderError, match=r"pooler\.weight.*unread=\"leave\""):
        order(doll, [tokens()])
    report = order(doll, [tokens()], unread="leave")
    assert report.unread == ("pooler.weight", "pooler.bias")
    assert torch.equal(doll._trace.root.pooler.weight, old)
    assert "pooler.weight" in str(report)


def test_groups_named_in_keep_stay() -> None:
    doll = made()
    old = doll._trace.root.up.weight.clone()
    report = order(doll, [tokens()], keep=["*"])
    assert torch.equal(doll._trace.root.up.weight, old)
    assert {g.kept for g in report.groups} == {"named in keep="}


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"nesting": "masked"}, {}, "masked"),
        ({"scope": "output", "sizes": [2, 5]}, {}, "scope"),
        ({}, {"by": "magic"}, "activation, outgoing, contribution, taylor"),
        ({}, {"by": "taylor"}, "loss="),
        ({}, {"batches": []}, "no batch"),
    ],
)
def test_refusals_say_what_to_do(options: dict, call: dict, message: str) -> None:
    doll = made(**options)
    with pytest.raises(OrderError, match=message):
        order(doll, **({"batches": [tokens()]} | call))


def test_tied_tensors_move_once() -> None:
    class Tied(Block):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

    doll = made(Tied())
    before = doll(tokens()).detach()
    order(doll, [tokens(1)])
    torch.testing.assert_close(doll(tokens()).detach(), before, rtol=1e-5, atol=1e-5)
    assert doll._trace.root.head.weight is doll._trace.root.table.weight


def test_cka_ignores_rotation_and_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert cka(x, 3 * x @ q) == pytest.approx(1.0)
    assert cka(x, torch.randn(40, 6)) < 0.5


def test_cka_of_wide_rows_is_that_of_the_formula() -> None:
    """Eq. 4 as it stands needs a matrix of the widths; rows of a vocabulary must not."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 300), torch.randn(5, 200)
    x, y = (v.double() - v.double().mean(0) for v in (a, b))
    formula = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert cka(a, b) == pytest.approx(float(formula), rel=1e-12)
    wide = torch.randn(4, 500_000)
    assert cka(wide, wide) == pytest.approx(1.0)


def test_moved_follows_every_dim() -> None:
    orders = {0: torch.tensor([1, 0, 2])}
    tensor = torch.arange(9).view(3, 3)
    shape = ((Nested(0, 3),), (Nested(0, 3),))
    assert moved(tensor, shape, orders).tolist() == [[4, 3, 5], [1, 0, 2], [7, 6, 8]]


class Channels(nn.Module):
    """Returns [n, channels, 5, 5]: the axis that nests stands in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return torch.tanh(h + self.b(h))


def test_channels_agree_by_place_not_by_column() -> None:
    """The CKA of rows [n 5 5, channels], by Kornblith et al. 2019, eq. 4 on Gram matrices."""
    x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(2))
    doll = mk.convert(Channels(), x, sizes=[2, 8], nesting="sliced")
    report = order(doll, [x])
    small, full = (
        v.detach().double().movedim(1, -1).flatten(0, 2) for v in doll.outputs(x).values()
    )
    centre = torch.eye(len(full), dtype=torch.float64) - 1 / len(full)
    k, m = (centre @ (v @ v.t()) @ centre for v in (small, full))
    wanted = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
    assert report.agreement[0][1] == pytest.approx(float(wanted), rel=1e-5)
    assert report.agreement[1] == (pytest.approx(1.0), pytest.approx(1.0))
