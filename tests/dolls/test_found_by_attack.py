"""What attackers found: each was wrong without a word, or ended in an error of no type."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import matryoshkafy as mk
from matryoshkafy.errors import GuardError, PlanError, TraceError

IDS = torch.arange(10).view(2, 5)


class Net(nn.Module):
    """An embedding, a linear, and what a test makes of them."""

    def __init__(self, width: int, use: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.use = width, use
        self.table, self.layer = nn.Embedding(30, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 30)
        self.register_buffer("scale", torch.tensor(width**-0.5))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> what `use` gives"""
        return self.use(self, torch.relu(self.layer(self.table(ids))))


class Tempered(Net):
    """What the head sums is scaled, as by a temperature of the width."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 30]"""
        return self.head(torch.relu(self.layer(self.table(ids)))) * self.width**-0.5


def identity(_: Net, x: Tensor) -> Tensor:
    """What the net computed."""
    return x


SCORES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "number": lambda net, x: x @ net.table.weight.T * net.width**-0.5,
    "size": lambda net, x: x @ net.table.weight.T / x.shape[-1],
    "root of a size": lambda net, x: x @ net.table.weight.T / x.shape[-1] ** 0.5,
    "buffer": lambda net, x: x @ net.table.weight.T * net.scale,
}


@pytest.mark.parametrize("kind", [*SCORES, "tempered"])
def test_scores_that_are_scaled_by_the_width_are_the_small_class_s(kind: str) -> None:
    made, use = (Net, SCORES[kind]) if kind in SCORES else (Tempered, identity)
    model, target = made(16, use).eval(), torch.arange(10).view(2, 5) % 7
    doll = mk.convert(model, (IDS,), sizes=[4, 8, 16], nesting="sliced")
    losses = mk.MatryoshkaLoss(nn.CrossEntropyLoss())(
        doll.outputs(IDS), target, return_per_size=True
    )[1]
    for size in doll.sizes:
        native = made(size, use).eval()
        native.load_state_dict(mk.slice(doll, size).state_dict(), strict=False)
        scores = native(IDS)
        torch.testing.assert_close(mk.slice(doll, size)(IDS), scores)
        torch.testing.assert_close(doll.outputs(IDS)[size], scores)
        expected = F.cross_entropy(scores.flatten(0, 1), target.flatten())
        torch.testing.assert_close(losses[size], expected)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_indices_repeated_by_a_tensor(nesting: str) -> None:
    times = torch.tensor([1, 2, 0, 1])

    def use(net: Net, x: Tensor) -> Tensor:
        return net.head(x)[:, torch.repeat_interleave(times)]

    model = Net(16, use).eval()
    doll = mk.convert(model, (IDS,), sizes=[4, 16], nesting=nesting)
    small = mk.slice(doll, 4)
    torch.testing.assert_close(small(IDS), doll.outputs(IDS)[4])
    assert small(IDS).shape == (2, 4, 30)


class OverGraph(nn.Module):
    """A sparse graph among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, graph: Tensor, x: Tensor) -> Tensor:
        """graph [N, N], x [N, 3] -> [N, 2]"""
        return self.last(torch.relu(torch.sparse.mm(graph, self.first(x))))


@pytest.mark.filterwarnings("ignore::matryoshkafy.dolls.caveats.RecordedPathWarning")
@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_a_sparse_argument(nesting: str) -> None:
    model, graph, x = OverGraph().eval(), torch.eye(4)[[1, 0, 3, 2]].to_sparse(), torch.randn(4, 3)
    doll = mk.convert(model, (graph, x), sizes=[4, 16], nesting=nesting)
    torch.testing.assert_close(doll(graph, x), model(graph, x))
    torch.testing.assert_close(mk.slice(doll, 4)(graph, x), doll.outputs(graph, x)[4])


def test_a_slice_and_its_optimizer_are_copied_together() -> None:
    doll = mk.convert(Net(16, SCORES["number"]).eval(), (IDS,), sizes=[4, 16], nesting="sliced")
    small = mk.slice(doll, 4)
    other, optimizer = copy.deepcopy((small, torch.optim.SGD(small.parameters(), lr=1.0)))
    before = [p.detach().clone() for p in small.parameters()]
    other(IDS).sum().backward()
    optimizer.step()
    pairs = zip(before, small.parameters(), other.parameters(), strict=True)
    for was, own, moved in pairs:
        assert torch.equal(was, own)
        assert moved.grad is None or not torch.equal(was, moved)


def test_a_reentrant_checkpoint_is_for_inference_and_says_so() -> None:
    def use(net: Net, x: Tensor) -> Tensor:
        again = checkpoint(net.layer, x, use_reentrant=True)
        assert isinstance(again, Tensor)
        return net.head(x + again)

    doll = mk.convert(Net(16, use), (IDS,), sizes=[4, 16])
    assert "use_reentrant=False" in doll.plan.remarks[0]
    with pytest.raises(TraceError, match="use_reentrant"):
        doll.train()


class Backwards(torch.autograd.Function):
    """A backward that raises outside of training, and that draws."""

    @staticmethod
    def forward(ctx: object, x: Tensor, trains: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x, twice."""
        ctx.trains = trains  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Twice the gradient."""
        assert ctx.trains, "only in training"  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        torch.manual_seed(3)
        return grad * 2, None


def test_a_backward_that_raises_or_draws_leaves_the_random_state() -> None:
    def use(net: Net, x: Tensor) -> Tensor:
        made = Backwards.apply(x, net.training)
        assert isinstance(made, Tensor)
        return net.head(made)

    model, state = Net(16, use).eval(), torch.random.get_rng_state()
    doll = mk.convert(model, (IDS,), sizes=[4, 16], nesting="sliced")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(doll(IDS), model(IDS))


class Passing(nn.Module):
    """What is passed on has a default that the forward does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)

    def scaled(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        return self.head(self.table(ids)) * scale

    def forward(self, ids: Tensor, **given: float) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        return self.scaled(ids, **given)


def test_a_constant_of_no_known_default_may_not_be_left_out() -> None:
    model = Passing().eval()
    doll = mk.convert(model, (IDS,), {"scale": 3.0}, sizes=[4, 16])
    with pytest.raises(TraceError, match="'scale' is missing.*not known"):
        doll(IDS)
    assert doll(IDS, scale=3.0).shape == (2, 5, 3)


def test_another_default_type_than_float32() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Embedding(30, 16), nn.LayerNorm(16), nn.Linear(16, 16))
        nn.init.uniform_(model[1].weight)
        doll = mk.convert(model.eval(), (IDS,), sizes=[8, 16], nesting="masked")
    finally:
        torch.set_default_dtype(torch.float32)
    assert doll(IDS).dtype == torch.float64


class Dynamic(nn.Module):
    """A depthwise convolution whose kernel each sample makes: groups count samples, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.kernel = nn.Linear(4, width), nn.Linear(width, width * 3)
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 4] -> [N, T, 3]"""
        x = self.first(x)
        n, length, width = x.shape
        kernel = self.kernel(x.mean(1)).view(n * width, 1, 3)
        rows = x.mT.reshape(1, n * width, length)
        made = F.conv1d(rows, kernel, padding=1, groups=n * width)
        return self.last(made.view(n, width, length).mT)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_groups_that_count_samples_follow_the_batch(nesting: str) -> None:
    model, x, other = Dynamic(16).eval(), torch.randn(2, 5, 4), torch.randn(3, 6, 4)
    doll = mk.convert(model, (x,), sizes=[4, 16], nesting=nesting)
    torch.testing.assert_close(mk.slice(doll, 4)(other), doll.outputs(other)[4])
    if nesting == "sliced":
        native = Dynamic(4).eval()
        native.load_state_dict(mk.slice(doll, 4).state_dict())
        torch.testing.assert_close(mk.slice(doll, 4)(other), native(other))
        torch.testing.assert_close(doll(other), model(other))


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Half of it."""
        return weight / 2


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_a_doll_whose_weights_were_replaced_is_refused_by_name(how: str) -> None:
    doll = mk.convert(Net(16, SCORES["number"]).eval(), (IDS,), sizes=[4, 16], nesting="sliced")
    layer = doll.get_submodule("layer")
    if how == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        parametrize.register_parametrization(layer, "weight", Half(), unsafe=True)
    for act in (lambda: mk.slice(doll, 4), lambda: mk.verify(doll, (IDS,))):
        with pytest.raises(PlanError, match=r"no tensor 'layer\.weight' any more"):
            act()


class Indexed(nn.Module):
    """A mask that is indexed by the rows of the ids: a trace sees no bond between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [N, T] -> [N, T, 3]"""
        return self.head(self.table(ids) * mask[torch.arange(ids.shape[0])][..., None])


def test_sizes_that_the_model_cannot_change_alone_are_held_equal() -> None:
    model, ids = Indexed().eval(), torch.arange(15).view(3, 5)
    doll = mk.convert(model, (IDS, torch.ones(2, 5)), sizes=[4, 16], nesting="sliced")
    with pytest.raises(GuardError, match=r"mask.shape\[0\] == ids.shape\[0\] only"):
        doll(ids, torch.ones(2, 5))
    torch.testing.assert_close(doll(ids, torch.ones(3, 5)), model(ids, torch.ones(3, 5)))
    assert mk.verify(doll, (IDS, torch.ones(2, 5))).passed


class TwoTexts(nn.Module):
    """Two inputs of one length each on the example, and of any on a call."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """one [N, T], other [N, S] -> [N, 3]"""
        return self.head(self.table(one).mean(1) * self.table(other).mean(1))


def test_sizes_that_only_happen_to_be_equal_stay_free() -> None:
    model, longer = TwoTexts().eval(), torch.arange(14).view(2, 7)
    doll = mk.convert(model, (IDS, IDS + 3), sizes=[4, 16], nesting="sliced")
    torch.testing.assert_close(doll(longer, IDS), model(longer, IDS))


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "numel": lambda x: x.pow(2).sum() / x.numel(),
    "all sizes": lambda x: x.pow(2).sum() / (x.shape[0] * x.shape[1] * x.shape[2]),
    "two sizes": lambda x: x.sum((1, 2)) / (x.shape[1] * x.shape[2]),
    "product": lambda x: x.sum((1, 2)) / math.prod(x.shape[1:]),
    "flat": lambda x: x.flatten().sum() / x.flatten().shape[0],
}


class Mean(nn.Module):
    """A mean over several axes, written by hand."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.how = nn.Embedding(30, width), how

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [] or [N]"""
        return MEANS[self.how](self.table(ids))


@pytest.mark.parametrize("how", list(MEANS))
def test_a_mean_by_hand_counts_the_values_of_its_size(how: str, tmp_path: Path) -> None:
    doll = mk.convert(Mean(16, how).eval(), (IDS,), sizes=[4, 8, 16], nesting="sliced")
    longer = torch.arange(18).view(3, 6)
    folder = mk.save(doll, tmp_path / "doll")
    for size in (4, 8, 16):
        small, native = mk.slice(doll, size), Mean(size, how).eval()
        native.load_state_dict(small.state_dict())
        for ids in (IDS, longer):
            torch.testing.assert_close(small(ids), native(ids))
            torch.testing.assert_close(doll.outputs(ids)[size], native(ids))
            torch.testing.assert_close(mk.load(folder, size=size)(ids), native(ids))


class Sixteenth(Mean):
    """The same number, but meant."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> []"""
        x = self.table(ids)
        return x.sum() / (x.shape[1] * 16)


def test_a_number_beside_a_size_that_the_line_holds_stays() -> None:
    doll = mk.convert(Sixteenth(16, "").eval(), (IDS,), sizes=[4, 16], nesting="sliced")
    native = Sixteenth(4, "").eval()
    native.load_state_dict(mk.slice(doll, 4).state_dict())
    torch.testing.assert_close(mk.slice(doll, 4)(IDS), native(IDS))


@custom_op("attacktest::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """Twice x; nobody says how it is derived."""
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_gradients_through_an_op_without_a_derivative_are_not_measured(nesting: str) -> None:
    model = Net(16, lambda net, x: twice(net.head(x))).eval()
    doll = mk.convert(model, (IDS,), sizes=[4, 16], nesting=nesting)
    report = mk.verify(doll, (IDS,), against=model)
    laws = {law.number: law for law in report.laws}
    assert report.passed and laws[8].holds is None
    assert "twice" in laws[5].detail and "gradients were not measured" in str(report)
    assert nesting == "masked" or "twice" in laws[8].detail


def test_a_doll_without_the_gradients_that_its_model_has_fails() -> None:
    model, other = Net(16, lambda net, x: net.head(x) * 2), Net(16, lambda n, x: twice(n.head(x)))
    other.load_state_dict(model.state_dict())
    doll = mk.convert(other, (IDS,), sizes=[4, 16], nesting="sliced")
    report = mk.verify(doll, (IDS,), against=model)
    laws = {law.number: law for law in report.laws}
    assert laws[1].holds and laws[8].holds is False and "twice" in laws[8].detail


@pytest.mark.parametrize("call", [mk.convert, mk.inspect, mk.verify], ids=lambda f: f.__name__)
def test_a_default_device_without_values_is_refused_by_name(call: Callable[..., object]) -> None:
    model = Net(16, lambda net, x: net.head(x + torch.zeros(16)))
    doll = mk.convert(model, (IDS,), sizes=[4, 16], nesting="sliced")
    given, more = (doll, {}) if call is mk.verify else (model, {"sizes": [4, 16]})
    with torch.device("meta"), pytest.raises(TraceError, match=r"default device.*'cpu'.*Leave"):
        call(given, (IDS,), **more)
    call(given, (IDS,), **more)


def test_a_model_without_values_is_planned_and_not_verified() -> None:
    with torch.device("meta"):
        model, ids = Net(16, lambda net, x: net.head(x)), torch.zeros(2, 5, dtype=torch.long)
        doll = mk.convert(model, (ids,), sizes=[4, 16], nesting="sliced")
    assert doll.sizes == [4, 16]
    with pytest.raises(PlanError, match="'meta' and has no values"):
        mk.verify(doll, (ids,))


def by_data(model: Net) -> None:
    """A tie of the memory alone."""
    model.other.weight = nn.Parameter(model.layer.weight.data)


def by_views(model: Net) -> None:
    """Views of one buffer that have a row in common."""
    rows = torch.randn(31, 16)
    model.layer.weight, model.other.weight = nn.Parameter(rows[:16]), nn.Parameter(rows[15:])


def by_buffer(model: Net) -> None:
    """A buffer in the memory of a parameter."""
    model.register_buffer("other_weight", model.layer.weight.data)


def beside(model: Net) -> None:
    """Views of one buffer beside each other, rows and columns."""
    rows, columns = torch.randn(32), torch.randn(16, 32)
    model.layer.bias, model.other.bias = nn.Parameter(rows[:16]), nn.Parameter(rows[16:])
    model.layer.weight = nn.Parameter(columns[:, :16])
    model.other.weight = nn.Parameter(columns[:, 16:])


def tied(model: Net) -> None:
    """The Parameter itself."""
    model.other.weight = model.layer.weight


class Two(Net):
    """Two layers whose memory a test shares."""

    def __init__(self, share: Callable[[Net], None]) -> None:
        super().__init__(16, lambda net, x: net.head(net.other(x)))
        self.other = nn.Linear(16, 16)
        share(self)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("share", [by_data, by_views, by_buffer])
def test_tensors_in_one_memory_are_refused_by_both_names(
    share: Callable[[Net], None], device: str
) -> None:
    with torch.device(device):
        model, ids = Two(share), torch.zeros(2, 5, dtype=torch.long)
        with pytest.raises(TraceError, match=r"'other.weight' is in .*'layer.weight'.*clone\(\)"):
            mk.convert(model, (ids,), sizes=[4, 16], nesting="sliced")


@pytest.mark.parametrize("share", [beside, tied])
def test_tensors_beside_each_other_or_tied_convert(share: Callable[[Net], None]) -> None:
    model = Two(share).eval()
    small = mk.slice(mk.convert(model, (IDS,), sizes=[4, 16], nesting="sliced"), 16)
    torch.testing.assert_close(small(IDS), model(IDS))


class Joint(nn.Module):
    """A norm over length and width together, in one dim."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 8] -> [N, T, 4]"""
        hidden = self.second(torch.relu(self.first(x)))
        turned = hidden.mT if self.how == "turned" else hidden
        flat = turned.flatten(1)
        flat = F.layer_norm(flat, flat.shape[1:]) if self.how == "norm" else F.normalize(flat)
        made = flat.view_as(turned)
        return self.last(made.mT if self.how == "turned" else made)


@pytest.mark.parametrize("how", ["norm", "length", "turned"])
def test_levels_over_a_length_fix_it_by_name(how: str, tmp_path: Path) -> None:
    model, x = Joint(how).eval(), torch.randn(3, 5, 8)
    doll = mk.convert(model, (x,), sizes=[4, 16], nesting="masked")
    mk.save(doll, tmp_path / "c")
    for found in (doll, mk.load(tmp_path / "c"), mk.load(tmp_path / "c", size=4)):
        for length in (1, 4, 10):
            with pytest.raises(GuardError, match=rf"'x' has size {length} in dimension 1.*== 5"):
                found(x[:, :1].expand(3, length, 8))
        assert found(x[:1]).shape == (1, 5, 4)
    assert "x.shape[1] == 5" in str(doll.plan) and mk.verify(doll, (x,)).passed
    free = mk.convert(model, (x,), sizes=[4, 16], nesting="sliced")
    torch.testing.assert_close(free(x[:, :3]), model(x[:, :3]))
