"""{size: output}: late as of the call or not at all, and the last linear in all its forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import matryoshkafy as mk
from matryoshkafy.losses import Distillation, MatryoshkaLoss
from matryoshkafy.losses.heads import MRLEHead, MRLHead
from matryoshkafy.outputs import Late, Outputs, OutputsError, Readout, scores_of

SIZES = [4, 8, 16]
NESTINGS = pytest.mark.parametrize("nesting", ["masked", "sliced"])


class Tagger(nn.Module):
    """ids [B, T] -> scores of `items` [B, T, 11], said in several ways."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.items = nn.Embedding(11, 16)
        self.mix = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.randn(11))
        self.heat = nn.Parameter(torch.tensor(0.3))
        self.tail = tail

    def forward(self, ids: Tensor) -> Any:
        h = self.drop(torch.relu(self.mix(self.items(ids))))
        product = h @ self.items.weight.T
        return TAILS[self.tail](self, h, product)


class Scores(NamedTuple):
    """A structured output."""

    logits: Tensor
    hidden: Tensor


TAILS: dict[str, Callable[[Tagger, Tensor, Tensor], Any]] = {
    "product": lambda m, h, p: p,
    "linear": lambda m, h, p: F.linear(h, m.items.weight, m.bias),
    "bias after": lambda m, h, p: p + m.bias,
    "temperature": lambda m, h, p: (m.bias + p) / 0.2,
    "learned temperature": lambda m, h, p: p * m.heat.exp() + m.bias,
    "tuple": lambda m, h, p: (p + m.bias, h),
    "dict": lambda m, h, p: {"hidden": h, "logits": p},
    "named": lambda m, h, p: Scores(p, h),
}


@cache
def converted(tail: str, nesting: str) -> mk.Doll:
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 5))
    return mk.convert(Tagger(tail).double(), (ids,), sizes=SIZES, nesting=nesting)


def doll_of(tail: str, nesting: str) -> mk.Doll:
    """A copy: a test may train it."""
    torch.manual_seed(0)
    return copy.deepcopy(converted(tail, nesting)).eval()


@NESTINGS
@pytest.mark.parametrize("tail", TAILS)
def test_a_last_linear_is_fused_in_every_form(tail: str, nesting: str) -> None:
    doll = doll_of(tail, nesting)
    ids, labels = torch.randint(11, (2, 7)), torch.randint(11, (2, 7))
    outputs, loss = doll.outputs(ids), MatryoshkaLoss(nn.CrossEntropyLoss())
    assert loss.fuses(outputs, labels)
    assert (outputs.readout is not None) == (nesting == "masked")
    found = torch.autograd.grad(loss(outputs, labels), list(doll.parameters()), allow_unused=True)
    each = [scores_of(doll.outputs(ids)[m]).flatten(0, 1) for m in SIZES]
    slow = torch.stack([F.cross_entropy(out, labels.flatten()) for out in each]).sum()
    expected = torch.autograd.grad(slow, list(doll.parameters()), allow_unused=True)
    torch.testing.assert_close(loss(outputs, labels), slow)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@NESTINGS
@pytest.mark.parametrize("tail", TAILS)
def test_every_output_is_that_of_the_slice(tail: str, nesting: str) -> None:
    doll = doll_of(tail, nesting)
    ids = torch.randint(11, (2, 7))
    outputs = doll.outputs(ids)
    for size in SIZES:
        expected = mk.slice(doll, size).eval()(ids)
        assert type(outputs[size]) is type(expected)
        torch.testing.assert_close(outputs[size], expected)


@NESTINGS
def test_distillation_between_structured_outputs(nesting: str) -> None:
    doll = doll_of("tuple", nesting)
    ids, labels = torch.randint(11, (2, 7)), torch.randint(11, (2, 7))
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), distill=Distillation())
    plain = {m: out[0] for m, out in doll.outputs(ids).items()}
    torch.testing.assert_close(loss(doll.outputs(ids), labels), loss(plain, labels))


def test_what_no_kernel_computes_is_not_fused() -> None:
    doll = doll_of("product", "masked")
    ids, labels = torch.randint(11, (2, 7)), torch.randint(11, (2, 7))
    weighted = nn.CrossEntropyLoss(torch.ones(11).double())
    assert not MatryoshkaLoss(weighted).fuses(doll.outputs(ids), labels)
    assert not MatryoshkaLoss(nn.MSELoss()).fuses(doll.outputs(ids), labels)
    assert not MatryoshkaLoss(nn.CrossEntropyLoss()).fuses(dict(doll.outputs(ids)), labels)


def step(doll: mk.Doll, **options: Any) -> None:
    optimizer = torch.optim.SGD(doll.parameters(), lr=0.1, **options)
    for p in doll.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@NESTINGS
@pytest.mark.parametrize("fused", [False, True])
def test_an_output_of_before_a_step_is_refused(nesting: str, fused: bool) -> None:
    doll = doll_of("product", nesting)
    outputs = doll.outputs(torch.randint(11, (2, 7)))
    early = outputs[4]
    step(doll, fused=fused)
    assert outputs[4] is early
    with pytest.raises(OutputsError, match=r"size 8 .* parameter '.*' changed.*step"):
        outputs[8]


@pytest.mark.parametrize(
    "change",
    [
        lambda doll, ids: doll.items.weight.detach().zero_(),
        lambda doll, ids: setattr(doll.mix.weight, "data", torch.zeros(16, 16).double()),
        lambda doll, ids: doll.load_state_dict(doll.state_dict()),
        lambda doll, ids: ids.zero_(),
    ],
)
def test_every_change_is_seen(change: Callable[[Any, Tensor], Any]) -> None:
    doll = doll_of("product", "sliced")
    ids = torch.randint(11, (2, 7))
    outputs = doll.outputs(ids)
    change(doll, ids)
    with pytest.raises(OutputsError, match="changed"):
        outputs[16]


def test_a_step_of_another_model_is_none_of_ours() -> None:
    doll = doll_of("product", "sliced")
    outputs = doll.outputs(torch.randint(11, (2, 7)))
    step(doll_of("product", "sliced"), fused=True)
    assert outputs[4].shape == (2, 7, 11)


@NESTINGS
def test_late_values_follow_the_mode_of_the_call(nesting: str) -> None:
    doll = doll_of("tuple", nesting)
    ids = torch.randint(11, (2, 7))
    doll.float()
    with torch.no_grad():
        still = doll.outputs(ids)
    plain = doll.outputs(ids)
    with torch.autocast("cpu", torch.bfloat16):
        half = doll.outputs(ids)
        assert plain[8][0].dtype == torch.float32
    assert plain[8][0].requires_grad and not still[8][0].requires_grad
    assert half[8][1].dtype == torch.bfloat16


def test_training_mode_is_that_of_the_call() -> None:
    doll = doll_of("product", "sliced")
    ids = torch.randint(11, (2, 7))
    outputs = doll.outputs(ids)
    doll.train()
    assert torch.equal(outputs[8], mk.slice(doll, 8).eval()(ids))
    assert doll.training and doll._root.training


def test_a_parameter_that_was_replaced_is_not_mixed_with_an_old_trunk() -> None:
    doll = doll_of("product", "masked")
    outputs = doll.outputs(torch.randint(11, (2, 7)))
    name, parameter = next(iter(doll.named_parameters()))
    place, _, leaf = name.rpartition(".")
    setattr(doll.get_submodule(place), leaf, nn.Parameter(torch.zeros_like(parameter)))
    with pytest.raises(OutputsError, match=name):
        outputs[8]


def test_a_failed_computation_fails_again() -> None:
    tries = []

    def compute() -> Tensor:
        tries.append(1)
        raise ValueError("no")

    outputs = Outputs({4: Late(compute), 8: torch.ones(1)})
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            outputs[4]
    assert len(tries) == 2
    assert outputs[8] == 1


def test_it_is_a_mapping() -> None:
    doll = doll_of("product", "masked")
    ids = torch.randint(11, (2, 7))
    outputs, again = doll.outputs(ids), doll.outputs(ids)
    assert outputs == again and outputs == dict(again)
    assert outputs != doll.outputs(ids + 1 - ids)
    assert list(outputs) == list(outputs.keys()) == SIZES
    assert [size for size, _ in outputs.items()] == SIZES
    torch.testing.assert_close(list(outputs.values()), [again[m] for m in SIZES])
    assert outputs.get(5) is None and outputs.get(4) is outputs[4]
    assert outputs.pop(4).shape == (2, 7, 11)
    assert 4 not in outputs and len(outputs) == 2 and list(dict(outputs)) == [8, 16]
    with pytest.raises(KeyError, match=r"size 4 .* \[8, 16\]"):
        outputs[4]
    outputs[8] = ids
    assert outputs[8] is ids and outputs.readout_at(8) is None


def test_heads_are_read_as_of_the_call() -> None:
    for head in (MRLHead(8, 3, [2, 8]), MRLEHead(8, 3, [2, 8])):
        outputs = head.outputs(torch.randn(5, 8))
        with torch.no_grad():
            next(head.parameters()).zero_()
        with pytest.raises(OutputsError, match="parameter"):
            outputs[2]


@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.5).double()])
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_running_logits_are_those_of_each_size(shape: tuple[int, ...], scale: Any) -> None:
    hidden, table, bias = torch.randn(shape), torch.randn(7, 8), torch.randn(7)
    readout = Readout(hidden.double(), table.double(), bias.double(), {9: 8, 2: 3, 3: 3}, scale)
    found = dict(readout.logits_by_size())
    assert list(found) == [2, 3, 9]
    for size, width in readout.widths.items():
        expected = hidden.double()[..., :width] * scale @ table.double()[:, :width].T + bias
        torch.testing.assert_close(found[size], expected)
        torch.testing.assert_close(readout.logits(size), expected)


@NESTINGS
@pytest.mark.parametrize("tail", [name for name in TAILS if name != "tuple"])
def test_scores_at_chosen_positions_are_those_of_the_whole_output(tail: str, nesting: str) -> None:
    doll = doll_of(tail, nesting)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows, last = torch.arange(2), torch.tensor([0, 2])
    doll.eval()
    whole = {size: scores_of(output) for size, output in doll.outputs(ids).items()}
    for index in ((rows, last), (slice(None), -1)):
        found = dict(doll.outputs(ids).scores_at(*index))
        assert list(found) == SIZES
        for size, scores in found.items():
            torch.testing.assert_close(scores, whole[size][index])


@NESTINGS
def test_a_place_of_any_form_chooses_as_it_does_of_the_output(nesting: str) -> None:
    doll = doll_of("linear", nesting).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = {size: scores_of(output) for size, output in doll.outputs(ids).items()}
    everything = slice(None)
    for index in ((0,), (ids > 2,), (None, 1), (..., -1, everything), (everything, None, 0), ()):
        for size, scores in doll.outputs(ids).scores_at(*index):
            torch.testing.assert_close(scores, whole[size][index])


@NESTINGS
@pytest.mark.parametrize("classes", (slice(0, 20), slice(1, None), 3, torch.tensor([1, 2])))
def test_a_choice_among_scores_is_no_place(nesting: str, classes: object) -> None:
    outputs = doll_of("linear", nesting).outputs(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    everything = slice(None)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for index in ((everything, -1, classes), (..., classes), (mask, classes)):
        with pytest.raises(OutputsError, match=r"last axis of scores \[2, 3, 11\]; choose"):
            list(outputs.scores_at(*index))  # pyright: ignore[reportArgumentType]


@NESTINGS
def test_scores_at_chosen_positions_compute_no_others(nesting: str) -> None:
    doll = doll_of("linear", nesting)
    outputs = doll.outputs(torch.ones(4, 50, dtype=torch.int64))
    with Widest() as widest:
        list(outputs.scores_at(slice(None), -1))
    # The table, turned, has a row for each of its 16 units.
    assert widest.rows <= 16, "of 200 positions four are scored"


@NESTINGS
@pytest.mark.parametrize("tail", [name for name in TAILS if name != "tuple"])
def test_a_loss_over_chosen_positions_is_theirs_alone(tail: str, nesting: str) -> None:
    doll = doll_of(tail, nesting).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    target = torch.tensor([3, 0, 7])
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), sizes=SIZES, weights=[3.0, 1.0, 0.5])
    outputs = doll.outputs(ids)
    chosen = outputs.at(rows, columns)
    assert loss.fuses(chosen, target) == loss.fuses(outputs, ids)
    found = torch.autograd.grad(loss(chosen, target), list(doll.parameters()), allow_unused=True)
    whole = {size: scores_of(output) for size, output in doll.outputs(ids).items()}
    pairs = zip(SIZES, (3.0, 1.0, 0.5), strict=True)
    want = sum(w * F.cross_entropy(whole[m][rows, columns], target) for m, w in pairs)
    grads = torch.autograd.grad(want, list(doll.parameters()), allow_unused=True)
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b)


class Widest(TorchDispatchMode):
    """The most rows of scores [.., 11] that any operator made."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim and out.shape[-1] == 11:
            self.rows = max(self.rows, out.numel() // 11)
        return out
