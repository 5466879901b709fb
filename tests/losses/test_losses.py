"""The losses against plain torch in float64, and the traps that other libraries fell into."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels import cross_entropy
from matryoshkafy.losses import (
    Distillation,
    MatryoshkaLoss,
    Readout,
    info_nce,
    nested_cross_entropy,
    nested_sampled_softmax,
)
from matryoshkafy.losses.distillation import divergences
from matryoshkafy.outputs import Late, Outputs
from tests.kernels import reference

SIZES = [1, 4, 8, 16]


def problem(rows=50, classes=33, width=16, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, dtype=dtype, generator=g).requires_grad_()
    table = torch.randn(classes, width, dtype=dtype, generator=g).requires_grad_()
    bias = torch.randn(classes, dtype=dtype, generator=g).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=g)
    target[::3] = -100
    return hidden, table, bias, target


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def plain(hidden, table, target, sizes, *, weights=None, scales=None, **options):
    if scales is None:
        losses = reference.nested_cross_entropy(hidden, table, target, sizes, **options)
    else:
        bias = options.pop("bias", None)
        scores = [F.linear(hidden[:, :m], table[:, :m], bias) for m in sizes]
        pairs = zip(scales, scores, strict=True)
        losses = torch.stack([F.cross_entropy(s * part, target, **options) for s, part in pairs])
    shape = [-1] + [1] * (losses.ndim - 1)
    return (losses * torch.tensor(weights or [1.0] * len(sizes)).to(losses).view(shape)).sum(0)


@pytest.fixture(params=[56_000_000, 40_000, 3_000], ids=["one-chunk", "chunks", "tiles"])
def budget(request, monkeypatch):
    monkeypatch.setitem(cross_entropy.BUDGET, "cpu", request.param)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, [16, 1, 8], [12], [2, 5]])
def test_value_and_gradients(budget, reduction, smoothing, biased, sizes):
    hidden, table, bias, target = problem()
    weights = [0.5 + k for k in range(len(sizes))]
    tensors = (hidden, table, bias) if biased else (hidden, table)
    options = {"bias": bias if biased else None, "label_smoothing": smoothing}
    options |= {"reduction": reduction, "weights": weights}
    assert_as_plain((hidden, table, target, sizes), options, tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, [12]])
def test_a_step_that_is_recorded_asks_for_no_value(budget, monkeypatch, reduction, scaled, sizes):
    """As under a CUDA graph: rows that do not count cannot be found, and must add nothing."""
    monkeypatch.setattr(cross_entropy, "is_recorded", lambda tensor: True)
    monkeypatch.setattr(torch, "nonzero", None)
    hidden, table, bias, target = problem()
    weights = [0.5 + k for k in range(len(sizes))]
    options = {"bias": bias, "reduction": reduction, "weights": weights}
    tensors = (hidden, table, bias)
    if scaled:
        start = torch.linspace(0.3, 2.0, len(sizes), dtype=torch.float64)
        options["scales"] = start.requires_grad_()
        tensors += (options["scales"],)
    assert_as_plain((hidden, table, target, sizes), options, tensors)
    left_out = nested_cross_entropy(hidden, table, target, sizes, bias=bias, reduction="none")
    assert not left_out[target == -100].any() and (target == -100).any()


def assert_as_plain(given, options, tensors):
    """The value, and the gradients of a random combination of it."""
    ours, theirs = nested_cross_entropy(*given, **options), plain(*given, **options)
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(theirs)
    found, expected = grads((ours * slope).sum(), *tensors), grads((theirs * slope).sum(), *tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, [16, 1, 8], [12]])
def test_scales_and_their_gradients(budget, reduction, smoothing, biased, sizes):
    hidden, table, bias, target = problem()
    scales = torch.linspace(0.3, 2.0, len(sizes), dtype=torch.float64).requires_grad_()
    tensors = (scales, hidden, table, *([bias] if biased else []))
    options = {"bias": bias if biased else None, "label_smoothing": smoothing, "scales": scales}
    options |= {"reduction": reduction, "weights": [0.5 + k for k in range(len(sizes))]}
    assert_as_plain((hidden, table, target, sizes), options, tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scales_under_compile(reduction):
    hidden, table, bias, target = problem()
    scales = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64).requires_grad_()

    def loss(scales):
        options = {"bias": bias, "reduction": reduction, "scales": scales}
        return nested_cross_entropy(hidden, table, target, SIZES, **options).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scales), loss(scales))
    for a, b in zip(
        grads(compiled(scales), scales, hidden, table, bias),
        grads(loss(scales), scales, hidden, table, bias),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_per_size_in_the_order_given(reduction):
    hidden, table, _, target = problem()
    sizes = [8, 1, 16]
    total, parts = nested_cross_entropy(
        hidden, table, target, sizes, weights=[2, 3, 4], reduction=reduction, return_per_size=True
    )
    expected = reference.nested_cross_entropy(hidden, table, target, sizes, reduction=reduction)
    torch.testing.assert_close(parts, expected.detach())
    torch.testing.assert_close(
        total.detach(), torch.tensordot(torch.tensor([2.0, 3, 4]).double(), parts, 1)
    )
    assert not parts.requires_grad


def test_leading_dims_and_strides():
    hidden, table, _, target = problem(24, 9, 16)
    wide = torch.randn(4, 16, 6, dtype=torch.float64).requires_grad_()
    folded = target.view(4, 6)
    view = wide.transpose(1, 2)
    ours = nested_cross_entropy(view, table.t().contiguous().t(), folded, SIZES)
    theirs = plain(view.reshape(24, 16), table, target, SIZES)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads(ours, wide), grads(theirs, wide))


def test_no_real_position_is_nan_as_in_torch():
    hidden, table, _, target = problem()
    target[:] = -100
    ours = nested_cross_entropy(hidden, table, target, SIZES)
    theirs = plain(hidden, table, target, SIZES)
    assert ours.isnan() and theirs.isnan()
    assert nested_cross_entropy(hidden, table, target, SIZES, reduction="sum") == 0
    dx, dtable = grads(
        nested_cross_entropy(hidden, table, target, SIZES, reduction="sum"), hidden, table
    )
    assert not dx.any() and not dtable.any()


def test_no_rows_and_one_row():
    hidden, table, _, target = problem(1)
    target[:] = 3
    torch.testing.assert_close(
        nested_cross_entropy(hidden, table, target, SIZES), plain(hidden, table, target, SIZES)
    )
    empty = nested_cross_entropy(hidden[:0], table, target[:0], SIZES, reduction="sum")
    assert empty == 0
    assert grads(empty, hidden)[0].shape == hidden.shape


def test_ignored_rows_may_hold_anything():
    hidden, table, _, target = problem()
    poisoned = hidden.detach().clone()
    poisoned[target == -100] = float("nan")
    poisoned.requires_grad_()
    loss = nested_cross_entropy(poisoned, table, target, SIZES)
    torch.testing.assert_close(loss, plain(hidden, table, target, SIZES))
    dx, dtable = grads(loss, poisoned, table)
    assert dx.isfinite().all() and dtable.isfinite().all()


def test_units_beyond_the_largest_size_are_not_read():
    hidden, table, _, target = problem()
    poisoned, garbage = hidden.detach().clone(), table.detach().clone()
    poisoned[:, 8:], garbage[:, 8:] = float("nan"), float("nan")
    poisoned.requires_grad_(), garbage.requires_grad_()
    loss = nested_cross_entropy(poisoned, garbage, target, [2, 8])
    torch.testing.assert_close(loss, plain(hidden, table, target, [2, 8]))
    for grad in grads(loss, poisoned, garbage):
        assert not grad[:, 8:].any() and grad[:, :8].any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_only_what_is_needed(wanted):
    tensors = list(problem()[:3])
    tensors = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    target = problem()[3]
    loss = nested_cross_entropy(*tensors[:2], target, SIZES, bias=tensors[2])
    expected = plain(*tensors[:2], target, SIZES, bias=tensors[2])
    assert loss.requires_grad == bool(wanted)
    if wanted:
        leaves = [tensors[k] for k in wanted]
        torch.testing.assert_close(grads(loss, *leaves), grads(expected, *leaves))


def test_extreme_logits_are_exact():
    hidden, table, _, target = problem()
    scaled = (hidden * 300).detach().float().requires_grad_()
    ours = nested_cross_entropy(scaled, table.float(), target, SIZES)
    torch.testing.assert_close(ours.double(), plain(scaled.double(), table, target, SIZES))


def test_float32_error_is_that_of_torch():
    hidden, table, _, target = problem(300, 500, 64, dtype=torch.float32)
    sizes = [8, 16, 32, 64]
    exact = [t.detach().double().requires_grad_() for t in (hidden, table)]
    truth = grads(plain(*exact, target, sizes), *exact)
    ours = grads(nested_cross_entropy(hidden, table, target, sizes), hidden, table)
    theirs = grads(plain(hidden, table, target, sizes), hidden, table)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert (a - t).norm() <= 3 * (b - t).norm()


def test_backward_twice_and_accumulation():
    hidden, table, _, target = problem()
    loss = nested_cross_entropy(hidden, table, target, SIZES)
    loss.backward(retain_graph=True)
    once = table.grad.clone()
    loss.backward()
    torch.testing.assert_close(table.grad, 2 * once)


def test_double_backward_is_refused():
    hidden, table, _, target = problem()
    loss = nested_cross_entropy(hidden, table, target, SIZES)
    with pytest.raises(MatryoshkafyError, match="no double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast():
    hidden, table, _, target = problem(200, 50, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nested_cross_entropy(hidden, table, target, SIZES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(hidden, table, target, SIZES), rtol=0.02, atol=0.02)
    dx, dtable = grads(loss, hidden, table)
    assert dx.dtype == dtable.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    hidden, table, bias, target = problem()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, table, bias):
        options = {"bias": bias, "reduction": reduction}
        return nested_cross_entropy(hidden * 2, table, target, SIZES, **options).sum()

    ours = grads(step(hidden, table, bias), hidden, table, bias)
    expected = plain(hidden * 2, table, target, SIZES, bias=bias, reduction=reduction).sum()
    torch.testing.assert_close(ours, grads(expected, hidden, table, bias))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"sizes": [4, 4]}, "distinct"),
        ({"sizes": [4, 17]}, "within 1..16"),
        ({"weights": [1.0]}, "one per size"),
        ({"reduction": "max"}, "reduction 'max' is not"),
        ({"target": torch.zeros(50, 33)}, "class indices"),
        ({"table": torch.zeros(33, 12, dtype=torch.float64)}, "should be"),
    ],
)
def test_messages(change, text):
    hidden, table, _, target = problem()
    given = {"hidden": hidden, "table": table, "target": target, "sizes": [4, 8]} | change
    with pytest.raises(MatryoshkafyError, match=text):
        nested_cross_entropy(**given)


def logits(hidden, table, sizes=SIZES):
    return {m: hidden[..., :m] @ table[:, :m].t() for m in sizes}


class Tail(Outputs):
    """What doll.outputs returns: values on demand, and the readout they come from."""

    def __init__(self, readout):
        self.touched = []
        late = {m: Late(partial(self.logits, readout, m)) for m in readout.widths}
        super().__init__(late, dict.fromkeys(readout.widths, readout))

    def logits(self, readout, size):
        self.touched.append(size)
        return readout.logits(size)


def tail(hidden, table, bias=None, **changes):
    return Tail(Readout(hidden, table, bias, {m: m for m in SIZES}, **changes))


def test_sum_of_a_criterion():
    hidden, table, _, target = problem()
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())(logits(hidden, table), target)
    torch.testing.assert_close(loss, plain(hidden, table, target, SIZES))


def test_weights_and_mean():
    outputs = {m: torch.tensor(float(m)) for m in SIZES}
    loss = MatryoshkaLoss(lambda out: out, SIZES, [1, 0, 0, 3], reduction="mean")
    assert loss(outputs) == (1 + 3 * 16) / 4
    assert MatryoshkaLoss(lambda out: out, [4, 8], {4: 2, 8: 5})(outputs) == 8 + 40


@pytest.mark.parametrize("distill", [None, Distillation(0.5, 2.0)])
@pytest.mark.parametrize("make", [logits, tail])
def test_order_of_sizes_changes_nothing(distill, make):
    hidden, table, _, target = problem()
    values = []
    for sizes in ([1, 4, 8, 16], [16, 8, 4, 1], [8, 16, 1, 4]):
        weights = {1: 1.0, 4: 2.0, 8: 3.0, 16: 4.0}
        aligned = [weights[m] for m in sizes]
        loss = MatryoshkaLoss(nn.CrossEntropyLoss(), sizes, aligned, distill=distill)
        values.append(loss(make(hidden, table), target))
    assert values[0] == values[1] == values[2]


def test_order_of_outputs_changes_nothing():
    hidden, table, _, target = problem()
    outputs = logits(hidden, table)
    backwards = dict(reversed(outputs.items()))
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), distill=Distillation())
    assert loss(outputs, target) == loss(backwards, target)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("make", [logits, tail])
def test_teacher_gets_no_gradient(kind, make):
    hidden, table, _, target = problem()

    def gradient(distill):
        hidden.grad = None
        weights = {1: 0.0, 4: 0.0, 8: 1e-3, 16: 0.0}
        loss = MatryoshkaLoss(nn.CrossEntropyLoss(), SIZES, weights, distill=distill)
        loss(make(hidden, table), target).backward()
        return hidden.grad.clone()

    taught = gradient(Distillation(100.0, 2.0, kind))
    assert not taught[:, 8:].any()
    assert taught[:, :8].any()


def soft_loss(kind, hidden, table, real, temperature):
    outs = {m: out[real] for m, out in logits(hidden, table).items()}
    teacher = outs[16].detach()
    if kind == "mse":
        return sum(F.mse_loss(outs[m], teacher) for m in (1, 4, 8))
    soft = F.softmax(teacher / temperature, -1)
    rows = [F.log_softmax(outs[m] / temperature, -1) for m in (1, 4, 8)]
    return sum(temperature**2 * F.kl_div(row, soft, reduction="batchmean") for row in rows)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("make", [logits, tail])
def test_distillation_value(kind, make):
    hidden, table, _, target = problem()
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), distill=Distillation(0.7, 3.0, kind))
    ours = loss(make(hidden, table), target)
    hard = plain(hidden, table, target, SIZES)
    expected = hard + 0.7 * soft_loss(kind, hidden, table, target != -100, 3.0)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grads(ours, hidden, table), grads(expected, hidden, table))


def test_distillation_is_float32_under_autocast():
    hidden, table, _, target = problem()
    outs = {m: (30 * out).to(torch.bfloat16) for m, out in logits(hidden, table).items()}
    loss = MatryoshkaLoss(lambda out, _: out.sum() * 0, distill=Distillation())
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(outs, target)
    exact = {m: out.double() for m, out in outs.items()}
    soft = F.softmax(exact.pop(16), -1)
    expected = sum(
        F.kl_div(F.log_softmax(out, -1), soft, reduction="batchmean") for out in exact.values()
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [logits, tail])
def test_distillation_is_between_scaled_scores(make):
    hidden, table, _, target = problem()
    starts = {1: 2.0, 4: 1.5, 8: 1.0, 16: 0.5}
    loss = MatryoshkaLoss(
        nn.CrossEntropyLoss(), SIZES, distill=Distillation(0.7), learn_scales=starts
    ).double()
    ours = loss(make(hidden, table), target)

    log_scales = torch.tensor([*starts.values()], dtype=torch.float64).log().requires_grad_()
    real, outs = target != -100, logits(hidden, table)
    scores = [outs[m][real] * s for m, s in zip(starts, log_scales.exp(), strict=True)]
    soft = F.softmax(scores[-1].detach(), -1)
    expected = sum(F.cross_entropy(out, target[real]) for out in scores) + 0.7 * sum(
        F.kl_div(F.log_softmax(out, -1), soft, reduction="batchmean") for out in scores[:-1]
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        grads(ours, hidden, table, loss.log_scales), grads(expected, hidden, table, log_scales)
    )


def test_nothing_is_mutated_or_patched():
    hidden, table, _, target = problem()
    outputs = logits(hidden, table)
    before = {m: out.detach().clone() for m, out in outputs.items()}
    keys, identities = list(outputs), {m: id(out) for m, out in outputs.items()}
    criterion = nn.CrossEntropyLoss()
    state = copy.deepcopy(criterion.__dict__)
    loss = MatryoshkaLoss(criterion, distill=Distillation(), normalize=True, n_sizes_per_step=3)
    mine = dict(loss.__dict__)
    loss(outputs, target).backward()
    assert list(outputs) == keys
    assert {m: id(out) for m, out in outputs.items()} == identities
    assert all(torch.equal(outputs[m], before[m]) for m in keys)
    assert criterion.__dict__ == state
    assert loss.__dict__ == mine


def test_sandwich_rule():
    sizes = [1, 2, 4, 8, 16, 32]
    outputs = {m: torch.tensor(float(m)) for m in sizes}
    loss = MatryoshkaLoss(
        lambda out: out, n_sizes_per_step=4, generator=torch.Generator().manual_seed(0)
    )
    seen = set()
    for _ in range(40):
        _, parts = loss(outputs, return_per_size=True)
        assert len(parts) == 4 and 1 in parts and 32 in parts
        seen |= set(parts)
    assert seen == set(sizes)


def test_sampling_follows_the_generator_and_leaves_the_global_one():
    outputs = {m: torch.tensor(float(m)) for m in range(1, 9)}

    def draw():
        loss = MatryoshkaLoss(
            lambda out: out, n_sizes_per_step=3, generator=torch.Generator().manual_seed(7)
        )
        return [float(loss(outputs)) for _ in range(5)]

    state = torch.get_rng_state()
    assert draw() == draw()
    assert torch.equal(torch.get_rng_state(), state)


def test_unsampled_sizes_are_not_computed():
    hidden, table, _, target = problem()
    outputs = tail(hidden, table)
    MatryoshkaLoss(nn.NLLLoss(), n_sizes_per_step=2)(outputs, target)
    assert sorted(set(outputs.touched)) == [1, 16]


@pytest.mark.parametrize("n", [None, 3])
def test_learned_scales_are_the_same_with_and_without_a_readout(n):
    hidden, table, bias, target = problem()

    def made():
        loss = MatryoshkaLoss(
            nn.CrossEntropyLoss(), SIZES, [1, 2, 3, 4], n, learn_scales=True,
            generator=torch.Generator().manual_seed(0),
        ).double()  # fmt: skip
        nn.init.uniform_(loss.log_scales, -1, 1, generator=torch.Generator().manual_seed(1))
        return loss

    outputs, fast, slow = tail(hidden, table, bias), made(), made()
    first = fast(outputs, target)
    second = slow({m: outputs.readout.logits(m) for m in SIZES}, target)
    torch.testing.assert_close(first, second)
    (a,), (b,) = grads(first, fast.log_scales), grads(second, slow.log_scales)
    torch.testing.assert_close(a, b)
    assert fast.scales().keys() == set(SIZES) and a.any()


def test_learned_scales_start_at_one_and_belong_to_the_optimizer():
    hidden, table, bias, target = problem()
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), [8, 16], learn_scales=True)
    plain_loss = MatryoshkaLoss(nn.CrossEntropyLoss(), [8, 16])
    outputs = tail(hidden, table, bias)
    torch.testing.assert_close(loss(outputs, target), plain_loss(outputs, target))
    assert [name for name, _ in loss.named_parameters()] == ["log_scales"]
    assert not list(plain_loss.parameters())


@pytest.mark.parametrize("given", [[0.5, 3.0], {16: 3.0, 8: 0.5}])
def test_learned_scales_start_where_they_are_told(given):
    hidden, table, bias, target = problem()
    outputs = tail(hidden, table, bias)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), [8, 16], learn_scales=given)
    expected = sum(
        F.cross_entropy(scale * outputs.readout.logits(size), target)
        for size, scale in ((8, 0.5), (16, 3.0))
    )
    torch.testing.assert_close(loss(outputs, target), expected)


def test_scales_to_start_from_are_positive_and_one_per_size():
    with pytest.raises(MatryoshkafyError, match="should be positive"):
        MatryoshkaLoss(nn.CrossEntropyLoss(), [8, 16], learn_scales=[1.0, 0.0])
    with pytest.raises(MatryoshkafyError, match="learn_scales .* one per size"):
        MatryoshkaLoss(nn.CrossEntropyLoss(), [8, 16], learn_scales=[1.0])


@pytest.mark.parametrize(
    "given, words",
    [
        ({"criterion": nn.CrossEntropyLoss(), "sizes": None}, "needs `sizes`"),
        ({"criterion": nn.MSELoss(), "sizes": [4, 8]}, "criterion is cross entropy"),
    ],
)
def test_scales_without_a_meaning_are_refused(given, words):
    with pytest.raises(MatryoshkafyError, match=words):
        MatryoshkaLoss(**given, learn_scales=True)


@pytest.mark.parametrize(
    "criterion, options",
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=5), {}),
        (nn.CrossEntropyLoss(reduction="sum"), {}),
        (nn.CrossEntropyLoss(reduction="none"), {}),
        (F.cross_entropy, {}),
        (partial(F.cross_entropy, ignore_index=-100, label_smoothing=0.2), {}),
    ],
)
def test_readout_is_recognised_and_equal(criterion, options):
    hidden, table, bias, target = problem()
    target = target.clamp(min=5)
    outputs = tail(hidden, table, bias, scale=0.5)
    loss = MatryoshkaLoss(criterion)
    fast = loss(outputs, target)
    assert outputs.touched == []
    slow = loss({m: outputs.readout.logits(m) for m in SIZES}, target)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(
        grads(fast.sum(), hidden, table, bias), grads(slow.sum(), hidden, table, bias)
    )
    torch.testing.assert_close(
        loss.per_size(outputs, target)[8], criterion(outputs.readout.logits(8), target).detach()
    )


def test_class_weights_use_the_logits():
    hidden, table, _, target = problem()
    criterion = nn.CrossEntropyLoss(weight=torch.rand(33, dtype=torch.float64))
    outputs = tail(hidden, table)
    expected = sum(criterion(out, target) for out in logits(hidden, table).values())
    torch.testing.assert_close(MatryoshkaLoss(criterion)(outputs, target), expected)


def test_class_last_logits():
    hidden, table, _, target = problem(24, 9, 16)
    folded, targets = hidden.view(4, 6, 16), target.view(4, 6)
    expected = plain(hidden, table, target, SIZES)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())
    torch.testing.assert_close(loss(logits(folded, table), targets), expected)
    torch.testing.assert_close(loss(tail(folded, table), targets), expected)
    torchlike = {m: out.transpose(1, 2) for m, out in logits(folded, table).items()}
    torch.testing.assert_close(loss(torchlike, targets), expected)


def test_two_sizes_of_one_width():
    hidden, table, _, target = problem()
    readout = Readout(hidden, table, None, {10: 4, 11: 4, 12: 16})
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), weights={10: 1, 11: 2, 12: 3})
    total, parts = loss(Tail(readout), target, return_per_size=True)
    torch.testing.assert_close(total, plain(hidden, table, target, [4, 16], weights=[3.0, 3.0]))
    assert parts[10] == parts[11]


def test_embeddings_are_normalised_per_size():
    a, b = torch.randn(2, 6, 16, dtype=torch.float64)
    anchors, positives = ({m: t[:, :m] for m in SIZES} for t in (a, b))
    loss = MatryoshkaLoss(info_nce, normalize=True)(anchors, positives)
    expected = sum(
        F.cross_entropy(F.normalize(a[:, :m]) @ F.normalize(b[:, :m]).t() / 0.05, torch.arange(6))
        for m in SIZES
    )
    torch.testing.assert_close(loss, expected)


def test_similarities_are_summed_in_float32_under_autocast():
    torch.manual_seed(0)
    outputs = {8: torch.randn(6, 8), 16: torch.randn(6, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        found = divergences(outputs, Distillation(kind="similarity"), None)
    small, large = (F.normalize(out.double(), dim=-1) for out in outputs.values())
    expected = (small @ small.t() - large @ large.t()).square().mean()
    assert found[8].item() == pytest.approx(expected.item(), rel=1e-5)


def test_similarity_distillation_of_embeddings():
    a = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    outputs = {m: a[:, :m] for m in SIZES}
    loss = MatryoshkaLoss(lambda out: out.sum() * 0, distill=Distillation(kind="similarity"))
    cos = {m: F.normalize(a[:, :m]) @ F.normalize(a[:, :m]).t() for m in SIZES}
    expected = sum((cos[m] - cos[16].detach()).square().mean() for m in (1, 4, 8))
    torch.testing.assert_close(loss(outputs), expected)
    with pytest.raises(MatryoshkafyError, match="similarity"):
        MatryoshkaLoss(lambda out: out.sum(), distill=Distillation())(outputs)


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: MatryoshkaLoss(F.mse_loss, [4, 4]), "distinct"),
        (lambda: MatryoshkaLoss(F.mse_loss, [4, 8], [1.0]), "one per size"),
        (lambda: MatryoshkaLoss(F.mse_loss, [4, 8], {4: 1.0}), "lack"),
        (lambda: MatryoshkaLoss(F.mse_loss, n_sizes_per_step=1), "at least 2"),
        (lambda: MatryoshkaLoss(F.mse_loss, reduction="max"), "'sum' or 'mean'"),
        (lambda: Distillation(kind="kd"), "one of kl"),
        (lambda: MatryoshkaLoss(F.mse_loss, [4, 5])({4: torch.zeros(1)}), "not \\[5\\]"),
    ],
)
def test_matryoshka_messages(build, text):
    with pytest.raises(MatryoshkafyError, match=text):
        build()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_sampled_softmax(shared, corrected):
    hidden, table, bias, target = problem()
    negatives = torch.randint(0, 33, (7,) if shared else (50, 7))
    log_q = torch.randn(33, dtype=torch.float64) if corrected else None
    loss, parts = nested_sampled_softmax(
        hidden,
        table,
        target,
        negatives,
        [8, 1, 16],
        bias=bias,
        log_q=log_q,
        weights=[1, 2, 3],
        return_per_size=True,
    )
    expected = []
    for m in (8, 1, 16):
        scores = hidden[:, :m] @ table[:, :m].t() + bias - (0 if log_q is None else log_q)
        rows = []
        for n in torch.nonzero(target != -100).flatten().tolist():
            own = negatives if shared else negatives[n]
            kept = torch.cat([target[n : n + 1], own[own != target[n]]])
            rows.append(F.cross_entropy(scores[n, kept][None], torch.tensor([0])))
        expected.append(torch.stack(rows).mean())
    torch.testing.assert_close(parts, torch.stack(expected).detach())
    total = expected[0] + 2 * expected[1] + 3 * expected[2]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(grads(loss, hidden, table, bias), grads(total, hidden, table, bias))


def test_sampled_softmax_against_all_classes_is_the_full_loss():
    hidden, table, _, target = problem()
    loss = nested_sampled_softmax(hidden, table, target, torch.arange(33), SIZES, reduction="sum")
    torch.testing.assert_close(loss, plain(hidden, table, target, SIZES, reduction="sum"))


def test_sampled_softmax_sparse_table():
    hidden, table, _, target = problem()
    table = table.detach().requires_grad_()
    loss = nested_sampled_softmax(hidden, table, target, torch.tensor([1, 2]), SIZES, sparse=True)
    loss.backward()
    assert table.grad.is_sparse
