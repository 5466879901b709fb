"""rotate(): the full model's function, the direction of ones, what stands in the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.bases import mean_kept, principal, turn, turned
from matryoshkafy.units.permute import OrderError
from matryoshkafy.units.rotate import rotate
from matryoshkafy.units.survey import survey


class PreNorm(nn.Module):
    """A pre-norm stream: table, two blocks, a last norm and a head."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 16)
        self.norms = nn.ModuleList([norm(16) for _ in range(3)])
        self.ups = nn.ModuleList([nn.Linear(16, 24, bias=False) for _ in range(2)])
        self.downs = nn.ModuleList([nn.Linear(24, 16) for _ in range(2)])
        self.head = nn.Linear(16, 11, bias=False)
        with torch.no_grad():
            for one in self.norms:
                for p in one.parameters():
                    p.add_(0.3 * torch.randn_like(p))
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            h = h + down(torch.relu(up(norm(h))))
        return self.head(self.norms[-1](h))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            h = norm(h + down(torch.relu(up(h))))
        return self.head(h)


class Front(PreNorm):
    """A nonlinearity writes the stream."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.table(x))
        h = h + self.downs[0](torch.relu(self.ups[0](self.norms[0](h))))
        return self.head(self.norms[-1](h))


class Last(PreNorm):
    """The last norm is the output."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.downs[0](torch.relu(self.ups[0](self.norms[0](h))))
        return self.norms[-1](h)


class Embeds(PreNorm):
    """Its output is the length-normalised stream."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.downs[0](torch.relu(self.ups[0](self.norms[0](h))))
        return torch.nn.functional.normalize(h.mean(1), dim=-1)


def tokens(seed: int = 0, rows: int = 8) -> Tensor:
    return torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(seed))


def made(model: nn.Module) -> Doll:
    return mk.convert(model, tokens(), sizes=[4, 8, 16], nesting="sliced")


MAIN = 16


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_pre_norm_stream_turns_and_the_function_stays(norm: type[nn.Module]) -> None:
    doll = made(PreNorm(norm))
    before = doll(tokens(3)).detach()
    report = rotate(doll, [tokens(1), tokens(2)])
    assert [row.units for row in report.rotated] == [MAIN]
    assert len(report.rotated[0].folded) == 3
    assert report.rotated[0].mean == (norm is nn.LayerNorm)
    assert relative_error(doll(tokens(3)).detach(), before) <= 1e-5
    assert report.error <= 1e-5 and mk.verify(doll, tokens()).passed
    for one in range(3):
        assert torch.equal(doll.state_dict()[f"norms.{one}.weight"], torch.ones(MAIN))


@pytest.mark.parametrize(
    ("gain", "bias", "turns"), [(0.0, 0.0, True), (1e-7, 2e-6, True), (0.0, 0.3, False)]
)
def test_a_gain_of_nothing_folds_where_its_bias_allows(
    gain: float, bias: float, turns: bool
) -> None:
    """Weight decay brings gains and biases of dead units to nothing together (Whisper has such)."""
    model = PreNorm()
    with torch.no_grad():
        model.norms[1].weight[3], model.norms[1].bias[3] = gain, bias
    before = model(tokens(3)).detach()
    doll = made(model)
    report = rotate(doll, [tokens(1)])
    assert [row.units for row in report.rotated] == ([MAIN] if turns else [])
    assert turns or "near zero beside its bias" in str(report)
    assert relative_error(report.put_back(doll, doll(tokens(3)).detach()), before) <= 1e-5


def test_a_slice_is_the_class_at_the_smaller_width() -> None:
    doll = made(PreNorm())
    rotate(doll, [tokens(1)])
    small = mk.slice(doll, 8)

    class Half(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            width, hidden = 8, 12
            self.table = nn.Embedding(11, width)
            self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
            self.ups = nn.ModuleList([nn.Linear(width, hidden, bias=False) for _ in range(2)])
            self.downs = nn.ModuleList([nn.Linear(hidden, width) for _ in range(2)])
            self.head = nn.Linear(width, 11, bias=False)

    native = Half()
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(tokens(4)), native(tokens(4)), rtol=1e-6, atol=1e-6)


def test_the_first_units_keep_more_than_an_order_does() -> None:
    """A stream of few directions, hidden by a random rotation: no permutation finds them."""
    torch.manual_seed(1)
    model = PreNorm(nn.RMSNorm)
    q = torch.linalg.qr(torch.randn(16, 16)).Q
    with torch.no_grad():
        for weight in (model.table.weight, model.downs[0].weight.t(), model.downs[1].weight.t()):
            weight[:, 4:] *= 0.01
            weight.copy_(weight @ q)
        for down in model.downs:
            down.bias[4:] *= 0.01
            down.bias.copy_(down.bias @ q)
    other = made(copy.deepcopy(model))
    doll = made(model)
    x = tokens(5)
    rotated, ordered = rotate(doll, [tokens(1)]), mk.order(other, [tokens(1)])
    assert rotated.rotated[0].kept[0] > 0.95
    full = doll(x).detach()
    errors = [relative_error(d.outputs(x)[8].detach(), full) for d in (doll, other)]
    assert errors[0] < errors[1], (errors, ordered)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: PostNorm(), "post-norm"),
        (lambda: Front(), "relu acts on each of its units"),
        (lambda: Last(), "the gain of the last norm stands at the output"),
        (lambda: PreNorm(tied=True), "tied"),
    ],
)
def test_what_stands_in_the_way_is_named_and_permuted(model: object, why: str) -> None:
    doll = made(model())  # type: ignore[operator]
    before = doll(tokens(3)).detach()
    report = rotate(doll, [tokens(1)], unread="leave")
    assert not report.rotated
    assert any(why in text for _, text in report.obstacles), report.obstacles
    assert relative_error(report.put_back(doll, doll(tokens(3))).detach(), before) <= 1e-5
    assert why in str(report)


def test_diagonal_gains_are_exact_where_gains_are_alike() -> None:
    """One gain for all units commutes with a rotation, outlier units stay units: no cost."""
    model = PostNorm()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.fill_(1.5)
            norm.weight[3], norm.weight[11] = 7.0, 0.2
    before = made(copy.deepcopy(model))(tokens(3)).detach()
    doll = made(model)
    report = rotate(doll, [tokens(1), tokens(2)], unread="leave", post_norm="diagonal", outliers=2)
    assert [row.units for row in report.rotated] == [MAIN] and not report.obstacles
    assert report.cost <= 1e-5 and report.error <= 1e-5
    assert relative_error(doll(tokens(3)).detach(), before) <= 1e-5
    gain = doll.state_dict()["norms.0.weight"]
    assert sorted(gain[:2].tolist()) == pytest.approx([0.2, 7.0], rel=1e-5)
    torch.testing.assert_close(gain[2:], torch.full((14,), 1.5))
    assert mk.verify(doll, tokens()).passed


class PostNormScaled(PostNorm):
    """Post-norm, and LayerScale on what each block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for norm, up, down, gain in zip(self.norms, self.ups, self.downs, self.gains, strict=False):
            h = norm(h + gain * down(torch.relu(up(h))))
        return self.head(h)


def test_a_gain_behind_a_product_costs_a_post_norm_stream_nothing() -> None:
    model = PostNormScaled()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.fill_(1.5)
    before = made(copy.deepcopy(model))(tokens(3)).detach()
    doll = made(model)
    report = rotate(doll, [tokens(1), tokens(2)], unread="leave", post_norm="diagonal", outliers=0)
    assert [row.units for row in report.rotated] == [MAIN] and report.cost <= 1e-5
    assert relative_error(doll(tokens(3)).detach(), before) <= 1e-5
    assert mk.verify(doll, tokens()).passed


def test_diagonal_gains_say_what_they_cost() -> None:
    """Other gains do not commute: diagonal and bias are least squares over the inputs."""
    model = PostNorm()
    gain, bias = (p.detach().double().clone() for p in model.norms[0].parameters())
    h = model.table(tokens(1))
    first = (h + model.downs[0](torch.relu(model.ups[0](h)))).detach()
    doll = made(model)
    report = rotate(doll, [tokens(1)], unread="leave", post_norm="diagonal", outliers=2)
    assert 1e-3 < report.cost < 1.0 and "diagonal gains" in str(report)
    (basis,) = report.bases.values()
    torch.testing.assert_close(basis @ basis.t(), torch.eye(16, dtype=torch.float64))
    normed = torch.nn.functional.layer_norm(first, (16,)).reshape(-1, 16).double()
    given, wanted = normed @ basis.t(), (normed * gain) @ basis.t()
    for unit in range(16):  # least squares, unit by unit
        line = torch.stack([given[:, unit], torch.ones(len(given))], 1).double()
        slope, shift = torch.linalg.lstsq(line, wanted[:, unit]).solution.tolist()
        assert float(doll.state_dict()["norms.0.weight"][unit]) == pytest.approx(slope, rel=1e-3)
        moved = float(doll.state_dict()["norms.0.bias"][unit] - (basis @ bias)[unit])
        assert moved == pytest.approx(shift, abs=1e-3)
    small = mk.slice(doll, 8)
    torch.testing.assert_close(doll.outputs(tokens(4))[8], small(tokens(4)))


def test_words_that_are_not_known_are_refused() -> None:
    with pytest.raises(OrderError, match="post_norm one of permute, diagonal"):
        rotate(made(PostNorm()), [tokens(1)], post_norm="dense")


@pytest.mark.parametrize("model", [Embeds, PostNorm])
def test_turn_is_the_way_there(model: type[nn.Module]) -> None:
    doll = made(model())
    before = doll(tokens(3)).detach()
    report = rotate(doll, [tokens(1)], unread="leave")
    after = doll(tokens(3)).detach()
    torch.testing.assert_close(report.turn(doll, before), after, rtol=1e-4, atol=1e-5)


def test_a_turned_output_is_put_back() -> None:
    doll = made(Embeds())
    before = doll(tokens(3)).detach()
    report = rotate(doll, [tokens(1)], unread="leave")
    after = doll(tokens(3)).detach()
    assert report.rotated and not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after @ after.t(), before @ before.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.put_back(doll, after), before, rtol=1e-4, atol=1e-5)


def test_turning_without_folding_is_seen() -> None:
    """The law fails where a gain was forgotten, or it measures nothing."""
    doll = made(PreNorm())
    before = doll(tokens()).detach()
    seen = survey(doll._trace.graph, doll.plan, doll._trace.state(), doll.plan.main)
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    turn(doll._trace.state(), doll.plan, {doll.plan.main: basis}, seen.scales)
    assert relative_error(doll(tokens()).detach(), before) > 1e-2


@pytest.mark.parametrize("count", [40, 5])
@pytest.mark.parametrize("widths", [[16], [8, 16], [3, 4, 9, 16], [1, 2, 16]])
def test_a_prefix_has_the_mean_of_the_whole(widths: list[int], count: int) -> None:
    """Orthogonal, keeps ones; the strong directions have no mean in any prefix of the ladder; also
    where fewer rows than units leave directions without energy.
    """
    torch.manual_seed(0)
    rows = torch.randn(count, 16, dtype=torch.float64) * torch.arange(16, 0, -1)
    q = mean_kept(rows.t() @ rows, widths)
    ones = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(q @ q.t(), torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(q @ ones, ones)
    free = rows - rows.mean(1, keepdim=True)
    strong = min(count, 16 - len(dict.fromkeys(widths)))
    units = q @ principal(free.t() @ free)[:strong].t()
    for width in widths:
        torch.testing.assert_close(units[:width].sum(0), torch.zeros(strong, dtype=torch.float64))
    first = min(strong, widths[0] - 1)
    kept = units[: widths[0], :first].square().sum(0)
    torch.testing.assert_close(kept, torch.ones(first, dtype=torch.float64))


def test_turned_is_a_product_on_every_axis() -> None:
    from matryoshkafy.axes.dims import Nested

    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    w = torch.randn(4, 4)
    shape = ((Nested(0, 4),), (Nested(0, 4),))
    torch.testing.assert_close(turned(w, shape, {0: q}), (q @ w.double() @ q.t()).float())


@pytest.mark.filterwarnings("ignore")  # of trained weights in masked nesting
def test_a_masked_doll_is_refused() -> None:
    doll = mk.convert(PreNorm(), tokens(), sizes=[8, 16])
    with pytest.raises(OrderError, match="masked"):
        rotate(doll, [tokens()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3"])
def test_a_library_model_turns(name: str) -> None:
    pytest.importorskip("transformers")
    from tests.zoo.registry import entries

    (entry,) = entries([name])
    model, args, kwargs = entry.build()
    doll = mk.convert(model, args, kwargs, sizes=[0.25, 0.5, 1.0], nesting="sliced")
    before = doll(*args, **kwargs)
    report = rotate(doll, [(tuple(args), dict(kwargs))], unread="leave")
    assert report.rotated and report.rotated[0].units == doll.plan.width
    assert relative_error(report.put_back(doll, doll(*args, **kwargs)), before) <= 1e-4


class OneHead(nn.Module):
    """Attention of a single head, whose inside nests: queries with keys, values with the output."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(11, 16), nn.RMSNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.o, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        n = self.norm(h)
        q, k, v = self.q(n), self.k(n), self.v(n)
        if self.fused:
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.head(h + self.o(mixed))
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1)
        return self.head(h + self.o(weights @ v))


def test_pairs_inside_a_head_turn_with_each_other() -> None:
    model = OneHead()
    doll = mk.convert(model, tokens(), sizes=[4, 8, 16], nesting="sliced")
    before = doll(tokens(3)).detach()
    with torch.no_grad():
        n = model.norm(model.table(tokens(1)))
        mixed = torch.softmax(model.q(n) @ model.k(n).transpose(-1, -2) * 0.25, -1) @ model.v(n)
    shares = torch.linalg.svdvals(mixed.reshape(-1, 16).double()).square()
    shares = shares.cumsum(0) / shares.sum()
    report = rotate(doll, [tokens(1)])
    found = {row.name: row for row in report.rotated}
    assert {"q.out", "v.out"} <= set(found)
    assert found["v.out"].kept == pytest.approx(
        [float(shares[i - 1]) for i in (4, 8, 16)], rel=1e-4
    )
    torch.testing.assert_close(doll(tokens(3)).detach(), before, rtol=1e-4, atol=1e-5)


def test_fused_attention_turns_as_its_parts_do() -> None:
    doll = mk.convert(OneHead(fused=True), tokens(), sizes=[4, 8, 16], nesting="sliced")
    before = doll(tokens(3)).detach()
    report = rotate(doll, [tokens(1)])
    assert {"q.out", "v.out"} <= {row.name for row in report.rotated}
    torch.testing.assert_close(doll(tokens(3)).detach(), before, rtol=1e-4, atol=1e-5)
    assert mk.verify(doll, tokens()).passed


class Scaled(PreNorm):
    """LayerScale: a learned gain on what each block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(2)])
        self.share = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for norm, up, down, gain in zip(self.norms, self.ups, self.downs, self.gains, strict=False):
            wrote = torch.dropout(down(torch.relu(up(norm(h)))), 0.1, self.training)
            h = h + gain * (self.share * wrote / 2)
        return self.head(self.norms[-1](h))


class ReadTwice(Scaled):
    """What the product wrote is read before its gain, too, so that the gain cannot be folded."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        wrote = self.downs[0](torch.relu(self.ups[0](self.norms[0](h))))
        return self.head(self.norms[-1](h + self.gains[0] * wrote + wrote))


class Experts(PreNorm):
    """Stacked weights of four experts, picked for each token; the norm's gain is read by them all,
    through a type of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.wide = nn.Parameter(torch.randn(4, 24, 16) / 4)
        self.back = nn.Parameter(torch.randn(4, 16, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        n = self.norms[0](h).flatten(0, 1)
        chosen = self.router(n).topk(2, -1).indices.flatten()
        rows = n.repeat_interleave(2, 0)[..., None]
        out = self.back[chosen] @ torch.relu(self.wide[chosen].to(rows.dtype) @ rows)
        summed = torch.zeros_like(n).index_add(
            0, torch.arange(len(n)).repeat_interleave(2), out[..., 0]
        )
        return self.head(self.norms[-1](h + summed.view_as(h)))


class Elsewhere(PreNorm):
    """Rows are padded, masked, shifted, pooled and written elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        length = 6 - x.shape[1]
        h = torch.nn.functional.pad(self.table(x), (0, 0, length, 0)).roll(1, 1)
        h = h.masked_fill((torch.arange(6) == 2)[:, None], 0.0)
        h = torch.where((x.sum(1) % 2 == 0)[:, None, None], h, h.flip(1)).type_as(h)
        h = h + self.downs[0](torch.relu(self.ups[0](self.norms[0](h))))
        h = torch.nn.functional.avg_pool1d(h.transpose(1, 2), 2).transpose(1, 2)
        return self.head(self.norms[-1](h))


class Cosine(PreNorm):
    """Scores are cosines with the rows of a table."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.downs[0](torch.relu(self.ups[0](self.norms[0](h))))
        unit = torch.nn.functional.normalize
        return unit(h, dim=-1) @ unit(self.head.weight, dim=-1).t()


class Filled(PreNorm):
    """Masked rows hold the same number at every unit: no rotation keeps them."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x).masked_fill((x == 3)[..., None], 0.5)
        return self.head(self.norms[-1](h + self.downs[0](torch.relu(self.ups[0](h)))))


@pytest.mark.parametrize("kind", [Scaled, Experts, Elsewhere, Cosine])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_what_only_moves_rows_and_gains_that_fold_stand_in_no_way(
    kind: type[PreNorm], norm: type[nn.Module]
) -> None:
    model = kind().eval()
    model.norms = PreNorm(norm).norms
    doll = made(model)
    before, kept = doll(tokens(3)).detach(), copy.deepcopy(model.state_dict())
    report = rotate(doll, [tokens(1), tokens(2)], unread="leave")
    assert [row.units for row in report.rotated] == [MAIN], report.obstacles
    assert relative_error(doll(tokens(3)).detach(), before) <= 1e-5
    assert relative_error(doll(tokens(4)).detach(), _fresh(model, kept, tokens(4))) <= 1e-5
    assert mk.verify(doll, tokens()).passed


def _fresh(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what the model computed with the weights that it had."""
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    with torch.no_grad():
        return other(x)


@pytest.mark.parametrize(
    ("kind", "why"), [(ReadTwice, "post-norm"), (Filled, "same number at every unit")]
)
def test_a_gain_read_before_and_a_number_written_are_obstacles(
    kind: type[PreNorm], why: str
) -> None:
    doll = made(kind().eval())
    before = doll(tokens(3)).detach()
    report = rotate(doll, [tokens(1)], unread="leave")
    assert not report.rotated and why in str(report)
    assert relative_error(report.put_back(doll, doll(tokens(3)).detach()), before) <= 1e-5
