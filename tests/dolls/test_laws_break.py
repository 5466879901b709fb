"""For each law a doll that is broken in that way, and `verify` (or `convert`) that sees it."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import matryoshkafy as mk
from matryoshkafy.axes.dims import Nested
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import Law, Report
from matryoshkafy.errors import PlanError
from matryoshkafy.plan.plan import Plan

SIZES = [2, 4, 8]


class Net(nn.Module):
    """Ids to scores over a tied table, with one hidden layer and a norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, L, 11]"""
        x = self.table(ids)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def ids() -> Tensor:
    return torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(0))


def doll_of(nesting: str = "masked", model: nn.Module | None = None) -> Doll:
    return mk.convert(model or Net().double(), (ids(),), sizes=SIZES, nesting=nesting)


def with_plan(doll: Doll, plan: Plan) -> Doll:
    """Return the doll that a wrong plan makes: convert would have refused it."""
    return Doll(doll._trace, plan)


def law(report: Report, number: int) -> Law:
    return next(row for row in report.laws if row.number == number)


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_every_law_holds_and_is_told(nesting: str) -> None:
    model = Net().double()
    doll = doll_of(nesting, model)
    report = mk.verify(doll, ids(), against=model)
    assert report.passed, report
    assert [row.number for row in report.laws] == list(range(1, 12))
    unmeasured = {row.number for row in report.laws if row.holds is None}
    assert unmeasured == ({1, 8, 11} if nesting == "masked" else {11})


def test_1_a_full_width_that_is_another_model() -> None:
    report = mk.verify(doll_of("sliced"), ids(), against=Net(8).double().apply(_scaled))
    assert law(report, 1).holds is False and not report.passed


def _scaled(module: nn.Module) -> None:
    if isinstance(module, nn.LayerNorm):
        module.weight.data.mul_(1.01)


def test_2_a_size_that_reads_beyond_its_prefix() -> None:
    """Without its masks a full pass mixes all units into every size."""
    doll = doll_of()
    actions = {n: a for n, a in doll.plan.actions.items() if a.kind != "mask"}
    broken = with_plan(doll, replace(doll.plan, actions=actions))
    report = mk.verify(broken, ids())
    assert law(report, 2).holds is False and not report.passed


def test_3_a_slice_of_a_slice_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from matryoshkafy.dolls import verify as module

    doll, cut = doll_of(), module.slice

    def careless(model: nn.Module, size: int) -> nn.Module:
        small = cut(model, size)
        if not isinstance(model, Doll):
            small.get_parameter("up.bias").data.add_(1e-9)
        return small

    monkeypatch.setattr(module, "slice", careless)
    assert law(mk.verify(doll, ids()), 3).holds is False


def test_4_a_plan_that_does_not_survive_its_file() -> None:
    doll = doll_of()
    plan = replace(doll.plan, remarks=[*doll.plan.remarks, "a list"])  # type: ignore[arg-type]
    assert law(mk.verify(with_plan(doll, plan), ids()), 4).holds is False


def test_4_a_doll_that_comes_back_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from matryoshkafy.dolls import laws

    taken_apart = laws.reduced

    def forgetful(model: nn.Module) -> tuple[object, tuple[object, ...]]:
        make, words = taken_apart(model)

        def again(*words: object) -> Doll:
            doll = make(*words)
            plan = doll.plan  # type: ignore[attr-defined]
            return with_plan(doll, replace(plan, actions={}))  # type: ignore[arg-type]

        return again, words

    monkeypatch.setattr(laws, "reduced", forgetful)
    found = law(mk.verify(doll_of(), ids()), 4)
    assert found.holds is False and "outputs move" in found.detail


class Sideways(torch.autograd.Function):
    """The first half of a vector; its gradient reaches the second half, too."""

    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        return weight[: len(weight) // 2].clone()

    @staticmethod
    def backward(ctx: object, given: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([given, given])


def test_5_gradients_that_reach_beyond_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the small size are right; entries that it does not keep learn from it."""
    from matryoshkafy.dolls import beyond

    compute = beyond.run

    def leaking(graph: fx.Graph, root: nn.Module, flat: list[object]) -> object:
        out = compute(graph, root, flat)
        bias = root.get_parameter("up.bias")
        half = Sideways.apply(bias)
        return [t + 0 * t.sum() + (half - half.detach()).sum() for t in out]  # type: ignore[union-attr]

    assert law(mk.verify(doll_of(), ids()), 5).holds is True
    monkeypatch.setattr(beyond, "run", leaking)
    found = law(mk.verify(doll_of(), ids()), 5)
    assert found.holds is False and "values 0.0e+00" in found.detail


def test_5_units_beyond_a_prefix_that_count() -> None:
    """A norm without its action takes the statistics of all units."""
    doll = doll_of()
    actions = {n: a for n, a in doll.plan.actions.items() if a.kind != "norm"}
    report = mk.verify(with_plan(doll, replace(doll.plan, actions=actions)), ids())
    assert law(report, 5).holds is False and not report.passed


def test_6_a_tie_that_comes_loose(monkeypatch: pytest.MonkeyPatch) -> None:
    from matryoshkafy.dolls.measure import Written

    cut = Written.slice

    def loose(written: Written, level: int) -> fx.GraphModule:
        small = cut(written, level)
        head = small.get_submodule("head")
        head.weight = nn.Parameter(head.weight.detach().clone())  # type: ignore[union-attr]
        return small

    monkeypatch.setattr(Written, "slice", loose)
    found = law(mk.verify(doll_of(), ids()), 6)
    assert found.holds is False and "head.weight" in found.detail


def test_7_what_has_no_rule_is_reported() -> None:
    plan = mk.inspect(nn.Sequential(nn.Linear(3, 8), Bessel(), nn.Linear(8, 8), nn.ReLU(),
                                    nn.Linear(8, 5)), (torch.randn(2, 3),))  # fmt: skip
    assert [u.op for u in plan.unknown] == ["special_bessel_j0"]
    assert "indexed" not in {w.why for w in plan.whole} and "unknown op" in str(plan)


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """x -> J0(x), which no rule knows."""
        return torch.special.bessel_j0(x)


class Stopped(Net):
    """The same values, another gradient."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, L, 11]"""
        x = self.table(ids).detach()
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def test_8_gradients_that_are_not_the_models() -> None:
    report = mk.verify(doll_of("sliced"), ids(), against=Stopped().double())
    assert law(report, 1).holds is True and law(report, 8).holds is False


def test_9_a_size_that_only_looks_free() -> None:
    """The trace of a fixed length claims that any length will do."""

    class Fixed(Net):
        def forward(self, ids: Tensor) -> Tensor:
            """ids [N, 4] -> [N, 4, 11]"""
            return super().forward(ids) + torch.arange(4)[:, None]

    doll = doll_of(model=Fixed().double())
    signature = doll._trace.signature
    guards = replace(signature.guards, conditions=())
    trace = replace(doll._trace, signature=replace(signature, guards=guards))
    report = mk.verify(Doll(trace, doll.plan), ids())
    assert law(report, 9).holds is False


def test_10_a_node_of_another_size_than_the_plan_says() -> None:
    doll = doll_of("sliced")
    name = next(n for n, dims in doll.plan.nodes.items() if n.startswith("gelu"))
    nodes = dict(doll.plan.nodes)
    (*rest, last) = doll.plan.dims(name)
    assert isinstance(last[0], Nested)
    nodes[name] = ((*rest, (dataclasses.replace(last[0], group=1 - last[0].group),)),)
    broken = with_plan(doll, replace(doll.plan, nodes=nodes))
    found = law(mk.verify(broken, ids()), 10)
    assert found.holds is False and "gelu" in found.detail


def test_11_a_slice_that_is_not_its_native_class() -> None:
    class Halved(Net):
        def forward(self, ids: Tensor) -> Tensor:
            """The small class forgets half of its residual stream."""
            return super().forward(ids) / 2

    doll = doll_of("sliced")
    small = Net(4).double()
    small.up, small.down = nn.Linear(4, 8).double(), nn.Linear(8, 4).double()
    assert law(mk.verify(doll, ids(), against={4: small}), 11).holds is True
    small = Halved(4).double()
    assert law(mk.verify(doll, ids(), against={4: small}), 11).holds is False


def test_rounding_is_told_from_a_wrong_size() -> None:
    """Sixty layers round to more than 1e-5 in float32, and agree in float64."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(3, 64)
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(60))
            self.head = nn.Linear(64, 5)
            for layer in self.layers:
                layer.get_parameter("weight").data.mul_(3.0)

        def forward(self, x: Tensor) -> Tensor:
            """x [N, 3] -> [N, 5]"""
            x = self.first(x)
            for layer in self.layers:
                x = torch.sin(layer(x))
            return self.head(x)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    report = mk.verify(mk.convert(Deep(), (x,), sizes=[16, 32, 64]), (x,))
    errors = [max(s.output_error, s.trunk_error) for s in report.sizes]
    assert report.passed and (report.exact is None or max(errors) > report.tolerance)


def test_convert_refuses_a_doll_whose_sizes_fail_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matryoshkafy.dolls import check

    compute = check.run

    def failing(graph: fx.Graph, *given: Any) -> Any:
        if len(graph.output_node().args[0]) > 1:
            raise RuntimeError("no two sizes at once")
        return compute(graph, *given)

    monkeypatch.setattr(check, "run", failing)
    with pytest.raises(PlanError, match="the pass over all sizes fails .*no two sizes at once"):
        doll_of()


def test_convert_refuses_what_breaks_a_law_by_size_and_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matryoshkafy.dolls.cuts import CutState

    read = CutState.read

    def wrong(state: CutState, name: str) -> Any:
        return read(state, name) + 1.0 if name == "up.bias" else read(state, name)

    monkeypatch.setattr(CutState, "read", wrong)
    with pytest.raises(
        PlanError, match=r"size 4 is not what its slice computes.*linear at .*keep="
    ):
        doll_of()
    assert isinstance(mk.convert(Net().double(), (ids(),), sizes=SIZES, check=False), Doll)
