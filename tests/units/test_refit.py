"""refit(): against least squares by torch.linalg in float64, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.least_squares import Affine, Products
from matryoshkafy.units.permute import OrderError
from matryoshkafy.units.refit import refit
from matryoshkafy.units.rotate import RotateReport
from tests.units.test_rotate import PostNorm, PreNorm, made, tokens

RIDGE = 1e-9


def solved(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [q, p] and bias of the least squares y = x w' + b."""
    x, y = x.double(), y.double()
    line = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    both = torch.linalg.lstsq(line, y).solution
    return both[:-1].t(), both[-1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unitwise", [True, False])
def test_the_sums_give_what_a_ridge_gives(bias: bool, unitwise: bool) -> None:
    """Ridge: rows of the root of the pull below the inputs, the start times them below y."""
    torch.manual_seed(0)
    x = torch.randn(40, 6) + 1
    y = x * 2 + torch.randn(40, 6) if unitwise else torch.randn(40, 3)
    start = Affine(
        torch.randn(6) if unitwise else torch.randn(3, 6), torch.zeros(()) if bias else None
    )
    products = Products(unitwise=unitwise)
    for part in (slice(0, 25), slice(25, 40)):
        products.add(x[part], y[part])
    found = products.fitted(start, 0.3)
    inputs, wanted = x.double(), y.double()
    if bias:
        inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
    root = (0.3 * inputs.square().mean() * len(x)).sqrt()
    if unitwise:
        for unit in range(6):
            rows = torch.cat([inputs[:, unit], root[None]])[:, None]
            aims = torch.cat([wanted[:, unit], (root * start.weight[unit])[None]])[:, None]
            slope = torch.linalg.lstsq(rows, aims).solution
            assert float(found.weight[unit]) == pytest.approx(float(slope), rel=1e-5)
        given = x.double() * found.weight
    else:
        rows = torch.cat([inputs, root * torch.eye(6).double()])
        aims = torch.cat([wanted, root * start.weight.double().t()])
        slopes = torch.linalg.lstsq(rows, aims).solution.t()
        torch.testing.assert_close(found.weight, slopes, rtol=1e-4, atol=1e-5)
        given = x.double() @ found.weight.t()
    assert (found.bias is None) == (not bias)
    given = given if found.bias is None else given + found.bias
    missed = (y - given).square().sum() / wanted.square().sum()
    assert products.missed(found) == pytest.approx(float(missed), rel=1e-4)


class Mlp(nn.Module):
    """Three products; the hidden axes nest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def inputs(seed: int, rows: int = 200) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def test_each_product_is_fitted_to_what_the_slice_gives_it() -> None:
    model = Mlp()
    doll = mk.convert(model, inputs(0), sizes=[4, 16], nesting="sliced")
    small, x = mk.slice(doll, 4), inputs(1)
    before = small(inputs(2)).detach()
    report = refit(small, doll, [x[:90], x[90:]], ridge=RIDGE)
    state = dict(small.state_dict())
    hidden = torch.tanh(model.first(x)).detach()
    torch.testing.assert_close(state["first.weight"], model.first.weight[:4].detach())
    weight, bias = solved(hidden[:, :4], model.second(hidden)[:, :4].detach())
    torch.testing.assert_close(state["second.weight"].double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["second.bias"].double(), bias, rtol=1e-3, atol=1e-4)
    own = torch.tanh(hidden[:, :4].double() @ weight.t() + bias)
    weight, bias = solved(own, model(x).detach())
    torch.testing.assert_close(state["third.weight"].double(), weight, rtol=1e-2, atol=1e-3)
    full = model(inputs(2)).detach()
    assert relative_error(small(inputs(2)).detach(), full) < 0.8 * relative_error(before, full)
    assert [row.weight for row in report.rows] == ["first.weight", "second.weight", "third.weight"]
    assert all(row.after <= row.before + 1e-9 for row in report.rows)
    assert "refitted 3 weights" in str(report)


def test_units_that_repeat_others_are_not_missed() -> None:
    """The second half repeats the first: nothing is lost, and the fit finds it."""
    model = Mlp()
    with torch.no_grad():
        for one in (model.first, model.second):
            one.weight[8:], one.bias[8:] = one.weight[:8], one.bias[:8]
    doll = mk.convert(model, inputs(0), sizes=[8, 16], nesting="sliced")
    small = mk.slice(doll, 8)
    assert relative_error(small(inputs(2)), model(inputs(2))) > 0.1
    refit(small, doll, [inputs(1)], ridge=1e-6)
    torch.testing.assert_close(small(inputs(2)), model(inputs(2)), rtol=1e-2, atol=1e-3)


def test_a_sum_is_right_not_its_product() -> None:
    """A product that is added to the stream makes up for what the stream lacks by then."""
    model = PreNorm()
    doll, x = made(model), tokens(1, 60)
    small = mk.slice(doll, 4)
    refit(small, doll, [x], ridge=RIDGE)
    state = dict(small.state_dict())

    def given(stream: Tensor, block: int) -> Tensor:
        gain = state[f"norms.{block}.weight"], state[f"norms.{block}.bias"]
        return torch.relu(F.layer_norm(stream, (4,), *gain) @ state[f"ups.{block}.weight"].t())

    def added(inner: Tensor, block: int) -> Tensor:
        return inner @ state[f"downs.{block}.weight"].t() + state[f"downs.{block}.bias"]

    full = own = model.table(x).detach()
    own = own[..., :4] + added(given(own[..., :4], 0), 0)
    for norm, up, down in zip(model.norms, model.ups, model.downs, strict=False):
        lacks = relative_error(own, full[..., :4])
        full = (full + down(torch.relu(up(norm(full))))).detach()
    inner = given(own, 1).flatten(0, 1)
    wanted = (full[..., :4] - own).flatten(0, 1)
    weight, bias = solved(inner, wanted)
    line = inner.double() @ weight.t() + bias  # few tokens: the weight itself is not unique
    assert lacks > 0.05
    torch.testing.assert_close(added(inner, 1).double(), line, rtol=1e-2, atol=1e-2)


def test_the_full_size_stays() -> None:
    doll = made(PreNorm())
    small = mk.slice(doll, 16)
    report = refit(small, doll, [tokens(1, 60)])
    assert all(row.before < 1e-6 for row in report.rows)
    torch.testing.assert_close(small(tokens(2)), doll(tokens(2)), rtol=1e-4, atol=1e-4)


def test_an_order_leads_from_before_to_after() -> None:
    doll = made(PreNorm())
    full = copy.deepcopy(doll)
    report = mk.order(doll, [tokens(1)])
    one, other = mk.slice(doll, 8), mk.slice(doll, 8)
    refit(one, doll, [tokens(1, 60)])
    refit(other, full, [tokens(1, 60)], report)
    torch.testing.assert_close(one(tokens(2)), other(tokens(2)), rtol=1e-3, atol=1e-3)


def turned_post_norm() -> tuple[Doll, Doll, RotateReport]:
    doll = made(PostNorm())
    full = copy.deepcopy(doll)
    return doll, full, mk.rotate(doll, [tokens(1, 60)], unread="leave", post_norm="diagonal")


def test_a_diagonal_rotation_is_fitted_to_the_model_before_it() -> None:
    """Its full size moved; with vectors alone, and more so with the weights, that comes back."""
    doll, full, report = turned_post_norm()
    x, wanted = tokens(3, 40), report.turn(full, full(tokens(3, 40))).detach()
    errors = [relative_error(doll(x).detach(), wanted)]
    for weights in (False, True):
        small = mk.slice(doll, 16)
        refit(small, full, [tokens(1, 60)], report, weights=weights)
        errors.append(relative_error(small(x).detach(), wanted))
    assert errors[2] < errors[1] < errors[0], errors


def test_a_slice_of_another_basis_is_refused() -> None:
    doll, full, report = turned_post_norm()
    small = mk.slice(doll, 8)
    before = copy.deepcopy(dict(small.state_dict()))
    with pytest.raises(OrderError, match="not what the report makes"):
        refit(small, full, [tokens(1)])
    with pytest.raises(OrderError, match="not what the report makes"):
        refit(small, doll, [tokens(1)], report)
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())


def test_a_folded_rotation_asks_for_the_rotated_doll() -> None:
    doll = made(PreNorm())
    full = copy.deepcopy(doll)
    report = mk.rotate(doll, [tokens(1)])
    with pytest.raises(OrderError, match="folded gains"):
        refit(mk.slice(doll, 8), full, [tokens(1)], report)
    refit(mk.slice(doll, 8), doll, [tokens(1)])


def test_a_tied_head_stays_and_is_named() -> None:
    doll = made(PreNorm(tied=True))
    report = refit(mk.slice(doll, 8), doll, [tokens(1)])
    assert "read in several places" in report.left["head.weight"] and "head.weight stays" in str(
        report
    )
    assert "table.weight" not in {row.weight for row in report.rows}


class Masked(PreNorm):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.norms[0](self.table(ids)) + self.downs[0](torch.relu(self.ups[0](self.table(ids))))
        return (self.head(h) * attention_mask[..., None]).sum(1)


def test_padding_is_left_out() -> None:
    doll = mk.convert(
        Masked(), (tokens(), torch.ones(8, 5).long()), sizes=[8, 16], nesting="sliced"
    )
    mask = torch.ones(40, 5).long()
    mask[:, 3:] = 0
    found = []
    for filler in (0, 7):
        ids = tokens(1, 40).masked_fill(mask == 0, filler)
        small = mk.slice(doll, 8)
        refit(small, doll, [(ids, mask)])
        found.append(dict(small.state_dict())["downs.0.weight"])
    torch.testing.assert_close(found[0], found[1])


def test_refusals_say_what_to_do() -> None:
    doll = made(PreNorm())
    with pytest.raises(OrderError, match="mk.slice"):
        refit(doll, doll, [tokens()])  # type: ignore[arg-type]
    with pytest.raises(OrderError, match="a batch at least"):
        refit(mk.slice(doll, 8), doll, [])
    with pytest.raises(OrderError, match="ridge above 0"):
        refit(mk.slice(doll, 8), doll, [tokens()], ridge=0.0)


def test_modes_stay() -> None:
    doll = made(PreNorm()).train()
    small = mk.slice(doll, 8).train()
    refit(small, doll, [tokens()])
    assert doll.training and small.training


class Routed(nn.Module):
    """Two experts, of which a router picks one for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.router = nn.Linear(6, 16), nn.Linear(16, 2)
        self.experts, self.down = nn.Embedding(2, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        return self.down(h + self.experts(self.router(h).argmax(-1)))


def test_what_depends_on_a_router_stays() -> None:
    """The slice's router picks others than the full model's: their rows do not belong together."""
    doll = mk.convert(Routed(), inputs(0), sizes=[8, 16], nesting="sliced")
    report = refit(mk.slice(doll, 8), doll, [inputs(1)])
    assert "router" in report.left["down.weight"]
    assert {row.weight for row in report.rows} == {"up.weight", "router.weight"}


def test_an_input_whose_axis_nests_is_cut() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(60, 16)
    doll = mk.convert(model, x, sizes=[4, 16], nesting="sliced", free="input")
    small = mk.slice(doll, 4)
    refit(small, doll, [x], ridge=RIDGE)
    weight, bias = solved(x[:, :4], model[0](x).detach()[:, :4])
    torch.testing.assert_close(
        small.state_dict()["0.weight"].double(), weight, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(small.state_dict()["0.bias"].double(), bias, rtol=1e-3, atol=1e-4)


SLOW = ("bert", "gpt2", "llama_gqa", "whisper", "swin", "mamba", "sasrec")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_a_library_model_is_fitted(name: str) -> None:
    """The full size keeps its function; the half comes nearer to it on what it was fitted to."""
    pytest.importorskip("transformers")
    from tests.zoo.registry import entries

    (entry,) = entries([name])
    model, args, kwargs = entry.build()
    doll = mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting="sliced", check=False).eval()
    batch = (tuple(args), dict(kwargs))
    full = outputs(doll, batch)
    whole, half = mk.slice(doll, 1.0), mk.slice(doll, 0.5)
    refit(whole, doll, [batch])
    assert relative_error(outputs(whole, batch), full) <= 1e-3
    before = missed(outputs(half, batch), full)
    report = refit(half, doll, [batch])
    assert report.rows and missed(outputs(half, batch), full) < before


def outputs(model: nn.Module, batch: tuple[tuple[object, ...], dict[str, object]]) -> Tensor:
    with torch.no_grad():
        found = tree_leaves(model(*batch[0], **batch[1]))
    return next(x for x in found if isinstance(x, Tensor) and x.is_floating_point())


def missed(found: Tensor, full: Tensor) -> float:
    full = full[tuple(map(slice, found.shape))]
    return float((found - full).square().sum() / full.square().sum())
