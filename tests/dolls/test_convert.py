"""convert(): the doll behaves like the module that it came from, and refuses what it cannot do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import NothingNests, PlanError, TraceError


class Block(nn.Module):
    """Embedding, attention, a gated feed-forward, batch norm, a head: most of what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 32)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.batch = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 7)
        self.drop = nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(nn.functional.silu(self.gate(self.norm(x))) * self.up(self.norm(x)))
        x = self.batch(self.drop(x).transpose(1, 2)).transpose(1, 2)
        return {"hidden": x, "logits": self.head(x)}


TOKENS = torch.randint(0, 19, (3, 5), generator=torch.Generator().manual_seed(0))
NESTINGS = pytest.mark.parametrize("nesting", ["sliced", "masked"])


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def doll_of(model: nn.Module, nesting: str = "masked", **options: Any) -> mk.Doll:
    return mk.convert(model, (TOKENS,), sizes=[8, 16, 32], nesting=nesting, **options)


def test_sliced_is_the_model_at_full_size(model: Block) -> None:
    ours, theirs = doll_of(model, "sliced")(TOKENS), model(TOKENS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@NESTINGS
def test_every_law_holds(model: Block, nesting: str) -> None:
    report = mk.verify(doll_of(model, nesting), (TOKENS,))
    assert report.passed, str(report)


@NESTINGS
def test_the_laws_hold_on_a_sub_model(model: Block, nesting: str) -> None:
    report = mk.verify(mk.slice(doll_of(model, nesting), 16), (TOKENS,))
    assert [s.size for s in report.sizes] == [8, 16]
    assert report.passed, str(report)


@NESTINGS
def test_shares_the_parameters_of_the_model(model: Block, nesting: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doll = doll_of(model, nesting)
    named = dict(model.named_parameters())
    assert all(named[name] is p for name, p in doll.named_parameters())
    assert list(doll.state_dict()) == list(model.state_dict())
    before = model.up.weight.detach().clone()
    sum(o["logits"].square().mean() for o in doll.outputs(TOKENS).values()).backward()
    optimizer.step()
    assert not torch.equal(before, doll.state_dict()["up.weight"])


@NESTINGS
def test_train_and_eval_switch_dropout_and_batch_norm(model: Block, nesting: str) -> None:
    doll = doll_of(model, nesting)
    still = [doll(TOKENS)["logits"] for _ in range(2)]
    assert torch.equal(*still)
    mean = model.batch.running_mean.clone()
    doll.train()
    moving = [doll(TOKENS)["logits"] for _ in range(2)]
    assert not torch.equal(*moving)
    assert not torch.equal(mean, model.batch.running_mean)


@NESTINGS
@pytest.mark.parametrize("shape", [(1, 5), (2, 9), (6, 3)])
def test_other_batch_and_length(model: Block, nesting: str, shape: tuple[int, int]) -> None:
    tokens = torch.randint(0, 19, shape)
    doll = doll_of(model, nesting)
    out = doll.outputs(tokens)
    assert out[8]["hidden"].shape == (*shape, 8)
    if nesting == "sliced":
        assert torch.allclose(doll(tokens)["logits"], model(tokens)["logits"], atol=1e-6)


@NESTINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(model: Block, nesting: str, dtype: torch.dtype) -> None:
    doll = doll_of(model, nesting).to(dtype)
    assert doll(TOKENS)["logits"].dtype == dtype
    assert mk.verify(doll, (TOKENS,)).passed


@NESTINGS
def test_autocast(model: Block, nesting: str) -> None:
    doll = doll_of(model, nesting)
    with torch.autocast("cpu", torch.bfloat16):
        assert doll(TOKENS)["logits"].dtype == torch.bfloat16


@NESTINGS
def test_deepcopy_is_independent(model: Block, nesting: str) -> None:
    doll = doll_of(model, nesting)
    twin = copy.deepcopy(doll)
    expected = doll(TOKENS)["logits"].clone()
    with torch.no_grad():
        model.up.weight.zero_()
    assert torch.equal(twin(TOKENS)["logits"], expected)
    assert not torch.equal(doll(TOKENS)["logits"], expected)


@NESTINGS
def test_compiles_as_one_graph(nesting: str) -> None:
    """Without nn.MultiheadAttention, which torch 2.15 fails to compile on its own (aot_eager)."""
    net = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    x = torch.randn(3, 6)
    doll = mk.convert(net, (x,), sizes=[8, 32], nesting=nesting)
    torch._dynamo.reset()
    compiled = torch.compile(doll, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), doll(x), atol=1e-6)


def test_a_slice_owns_its_memory_and_slices_again(model: Block) -> None:
    doll = doll_of(model)
    small = mk.slice(doll, 16)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in small.parameters()}
    again, direct = mk.slice(small, 8), mk.slice(doll, 8)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in direct.state_dict().items())


def test_ffn_scope_keeps_the_residual_stream(model: Block) -> None:
    doll = mk.convert(model, (TOKENS,), sizes=[0.5, 1.0], nesting="sliced", scope="ffn")
    (group,) = doll.plan.groups
    assert group.size == 48
    small = mk.slice(doll, doll.sizes[0])
    assert small.get_parameter("up.weight").shape == (24, 32)
    assert mk.verify(doll, (TOKENS,)).passed


def test_output_scope_changes_no_weight(model: Block) -> None:
    doll = mk.convert(model, (TOKENS,), sizes=[8, 32], scope="output")
    out = doll.outputs(TOKENS)
    assert torch.equal(out[8]["hidden"], model(TOKENS)["hidden"][..., :8])
    assert mk.slice(doll, 8).get_parameter("up.weight").shape == (48, 32)


@NESTINGS
def test_an_input_that_feeds_the_stream_can_be_freed(nesting: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    stack, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 3, 32)
    options: dict[str, Any] = {"nesting": nesting, "free": ["src"]}
    doll = mk.convert(stack, (x,), sizes=[8, 32], **options)
    assert mk.verify(doll, (x,)).passed
    assert mk.slice(doll, 8)(x[..., :8]).shape == (2, 3, 8)


def test_overrides_set_the_widths_of_a_group(model: Block) -> None:
    doll = doll_of(model, overrides={"up.out": [24, 48, 48]})
    assert mk.slice(doll, 8).get_parameter("up.weight").shape[0] == 24


def test_keep_holds_a_layer_whole(model: Block) -> None:
    doll = doll_of(model, keep=["up"])
    assert mk.slice(doll, 8).get_parameter("up.bias").shape == (48,)
    assert mk.verify(doll, (TOKENS,)).passed


def test_plan_round_trips_and_prints(model: Block) -> None:
    plan = mk.inspect(model, (TOKENS,), sizes="8..32")
    assert mk.Plan.from_json(plan.to_json()) == plan
    assert plan.width == 32
    for word in ("embed", "vocabulary", "classes", "head.weight:0"):
        assert word in str(plan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nesting": "nested"}, ("nesting='nested'", "masked", "sliced")),
        ({"scope": "ffn"}, ('scope="ffn"', 'nesting="sliced"')),
        ({"norm": "layer"}, ("norm='layer'", "block")),
        ({"keep": ["nowhere"]}, ("keep='nowhere'", "matches no")),
        ({"overrides": {"nowhere": [1, 2, 3]}}, ("'nowhere'", "the groups are")),
        ({"overrides": {"up.out": [5, 4, 48]}}, ("up.out", "ascending")),
        ({"free": ["nowhere"]}, ("nowhere", "the inputs are")),
    ],
)
def test_bad_requests_say_what_to_do(
    model: Block, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError) as caught:
        doll_of(model, **options)
    assert all(word in str(caught.value) for word in words)


def test_sizes_must_end_at_the_width(model: Block) -> None:
    with pytest.raises(mk.MatryoshkafyError, match="32"):
        mk.convert(model, (TOKENS,), sizes="8..64")


def test_an_unknown_size_lists_the_sizes(model: Block) -> None:
    with pytest.raises(PlanError, match="8, 16, 32"):
        mk.slice(doll_of(model), 10)


def test_a_failing_forward_names_the_line(model: Block) -> None:
    with pytest.raises(TraceError) as caught:
        mk.convert(model, (torch.randn(3, 5),), sizes=[0.5, 1.0])
    assert "fails on the example inputs" in str(caught.value)
    assert "float32[3, 5]" in str(caught.value)


def test_a_model_without_any_width() -> None:
    with pytest.raises(NothingNests, match="classes"):
        mk.convert(nn.Linear(3, 4), (torch.randn(2, 3),), sizes=[0.5, 1.0])


class Stray(nn.Module):
    """Computes something else while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h * 2 if torch.compiler.is_compiling() else h)


def test_a_trace_that_computes_something_else_is_refused() -> None:
    with pytest.raises(TraceError, match="does not compute what the model computes"):
        mk.convert(Stray(), (torch.randn(3, 4),), sizes=[0.5, 1.0])


def test_the_model_is_left_as_it_was(model: Block) -> None:
    model.train()
    model.drop.eval()
    doll_of(model)
    assert model.training and not model.drop.training


class Uneven(nn.Module):
    """One path for each positive row of the big model; a small one has fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[:6], self.first.bias[:6] = 0.0, -1.0
            self.first.weight[6:], self.first.bias[6:] = 0.0, 9.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, 3] -> [N, 3]"""
        h = self.first(x)
        parts = h[h.sum(-1) > 0].unbind(0)
        return self.last(torch.stack([part * (i + 1) for i, part in enumerate(parts)]))


def test_a_recorded_path_that_no_smaller_model_can_take_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(mk.MatryoshkafyError, match=r"(?s)cannot be taken at every size.*test_conv"):
        mk.convert(Uneven(), (x,), sizes=[0.25, 1.0], nesting="sliced")


class Routed(nn.Module):
    """Experts on the rows that ask for them; a small model asks for others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router, self.last = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        chosen, out = self.router(h).argmax(-1), torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == i)
            if rows.shape[0] == 0:
                continue
            out = out.index_add(0, rows, expert(h[rows]))
        return self.last(h + out)


def test_experts_that_small_sizes_choose_otherwise_are_refused_with_what_to_do() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    with pytest.raises(TraceError, match="(?s)test_convert.py.*one product over all") as found:
        mk.convert(Routed(), (x,), sizes=[0.25, 1.0], nesting="sliced")
    assert "mk.rule" not in str(found.value)


class Readied(nn.Module):
    """Takes its shift from the first inputs that it sees; a buffer or an attribute says so."""

    shift: torch.Tensor
    held: torch.Tensor

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.first, self.last, self.flag = nn.Linear(3, 16), nn.Linear(16, 5), flag
        self.register_buffer("shift", torch.zeros(16))
        self.register_buffer("held", torch.tensor(False))
        self.known = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, 3] -> [N, 5]"""
        h = self.first(x)
        if not (self.held if self.flag == "held" else self.known):
            self.shift.copy_(h.detach().mean(0))
            self.held.fill_(True)
            self.known = True
        return self.last((h - self.shift).tanh())


@pytest.mark.filterwarnings("ignore")  # a branch on a buffer is recorded, and said
@pytest.mark.parametrize("flag", ["held", "known"])
def test_a_model_that_its_first_call_makes_ready_is_refused_until_it_is(flag: str) -> None:
    model, x, y = Readied(flag), torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(TraceError, match=r"call it once \(model\(\*inputs\)\)"):
        mk.convert(model, (x,), sizes=[8, 16], nesting="sliced")
    assert not model.held and not model.known and not model.shift.any()
    model(x)
    doll = mk.convert(model, (x,), sizes=[8, 16], nesting="sliced")
    torch.testing.assert_close(doll(y), model(y))


def test_a_rule_that_raises_costs_widths_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(walk: object, node: object, args: object) -> None:
        raise IndexError("not foreseen")

    from dataclasses import replace

    from matryoshkafy.rules.table import OPS

    monkeypatch.setitem(OPS, "tanh", replace(OPS["tanh"], axes=broken))
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    doll = mk.convert(model, (torch.randn(4, 3),), sizes=[0.5, 1.0])
    assert mk.verify(doll, (torch.randn(4, 3),)).passed
    assert doll.plan.parameters["0.weight"] == ((8,), (3,))
    assert "tanh (its rule raised IndexError: not foreseen)" in str(doll.plan)


def test_the_columns_of_an_embedding_are_what_comes_out_of_it() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = mk.inspect(model, (torch.zeros(2, 3, dtype=torch.long),))
    assert {group.name for group in plan.groups} == {"0.out", "1.out"}


@dataclass
class Answer:
    """What a user's forward returns, by name."""

    scores: Tensor
    mean: Tensor | None = None


class Named(nn.Module):
    """A forward that returns a dataclass beside a tensor, or alone."""

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.up, self.down, self.alone = nn.Linear(5, 8), nn.Linear(8, 3), alone

    def forward(self, x: Tensor) -> object:
        h = self.up(x).tanh()
        named = Answer(self.down(h), h.mean(-1))
        return named if self.alone else (self.down(h), named)


@pytest.mark.parametrize("alone", [True, False])
def test_an_output_whose_tensors_no_graph_sees_is_refused(alone: bool) -> None:
    with pytest.raises(TraceError, match="the forward returns Answer, .*register_dataclass"):
        mk.convert(Named(alone=alone), torch.ones(2, 5), sizes=[4, 8], nesting="sliced")


class Optional(nn.Module):
    """Constants with defaults of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 1.0, deep: bool | None = None) -> Tensor:
        h = self.inner(x) * scale
        return self.outer(h.tanh() if deep else h)


def test_a_constant_whose_default_is_another_may_not_be_left_out(tmp_path: Any) -> None:
    model, x = Optional().eval(), torch.randn(5, 4)
    doll = mk.convert(model, x, {"scale": 2.0, "deep": True}, sizes=[4, 8], nesting="sliced")
    loaded = mk.load(mk.save(doll, tmp_path / "doll"))
    for made in (doll, mk.slice(doll, 4), loaded):
        with pytest.raises(TraceError, match="'scale' is missing: .* traced with 2.0"):
            made(x)
    # The forward's own default of `deep` is None: no value that somebody chose.
    expected = model(x, scale=2.0, deep=True)
    for made in (doll, loaded):
        torch.testing.assert_close(made(x, scale=2.0), expected)


def test_a_constant_whose_default_was_traced_may_be_left_out() -> None:
    model, x = Optional().eval(), torch.randn(5, 4)
    doll = mk.convert(model, x, {"scale": 1.0}, sizes=[4, 8], nesting="sliced")
    torch.testing.assert_close(doll(x), model(x))


class Standardised(nn.Module):
    """The rows of a weight over their own lengths, which every size shares."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.normalize(self.inner.weight, dim=1)
        return self.outer(nn.functional.linear(self.first(x), weight).tanh())


def test_verify_names_what_every_size_reads_whole() -> None:
    x = torch.randn(5, 4)
    report = mk.verify(mk.convert(Standardised(), x, sizes=[4, 8], nesting="masked"), x)
    assert report.whole == ("inner.weight",)
    assert "inner.weight" in str(report)
    assert "inner.weight" in next(law.detail for law in report.laws if law.number == 5)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    assert mk.verify(mk.convert(plain, x, sizes=[4, 8], nesting="masked"), x).whole == ()


class Scored(nn.Module):
    """The forward pass of a conditional random field: reductions that drop their dim."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.emit = nn.Embedding(30, width), nn.Linear(width, 6)
        self.step, self.last = nn.Parameter(torch.randn(6, 6)), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 3]"""
        x = self.table(ids)
        emitted = self.emit(x)
        score = emitted[:, 0]
        for t in range(1, 3):
            score = (score.unsqueeze(2) + self.step + emitted[:, t].unsqueeze(1)).logsumexp(1)
        return self.last(x + score.logsumexp(-1)[:, None, None])


def test_values_that_lose_a_dim_are_looked_at_for_levels_beside_a_size() -> None:
    ids = torch.arange(10).view(2, 5)
    doll = mk.convert(Scored(8).double(), (ids,), sizes=[4, 8], nesting="masked")
    for call in (ids, ids[:1], torch.arange(21).view(3, 7)):
        torch.testing.assert_close(doll.outputs(call)[4], mk.slice(doll, 4)(call))
