"""A graph is compared with its model at sizes that the example does not have, in few forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from matryoshkafy.dolls.tracing import traced
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.trace import NO_TRAINING, trace
from matryoshkafy.graph.trials import trials_of

Body = Callable[["Tagger", Tensor], Tensor]
Seen = list[tuple[bool, tuple[int, ...]]]


class Tagger(nn.Module):
    """Attention over tokens, with dropout; `odd` says where an eager call is another than a traced
    one, which no trace can see.
    """

    def __init__(self, odd: Callable[[Tagger, Tensor], bool] = lambda _, ids: False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8).double()
        self.query, self.key = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.head, self.drop, self.odd = nn.Linear(8, 3).double(), nn.Dropout(0.3), odd

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, 3]"""
        h = self.drop(self.table(ids))
        weights = (self.query(h) @ self.key(h).transpose(1, 2)).softmax(-1)
        out = self.head(weights @ h)
        if torch.compiler.is_exporting():
            return out
        return out * 2 if self.odd(self, ids) else out


def ids(batch: int = 2, length: int = 6) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % 11


@pytest.fixture
def seen() -> Iterator[Seen]:
    """The mode and the sizes of every real call of a tagger."""
    calls: Seen = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, Tagger) and type(given[0]) is Tensor:
            calls.append((module.training, tuple(given[0].shape)))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    yield calls
    handle.remove()


def test_every_size_is_larger_and_at_one() -> None:
    found = trace(Tagger(), (ids(),))
    trials = trials_of(found.signature.guards, [ids()])
    assert trials is not None
    (other,), (one,) = trials
    # The example's rows and tokens, and the first of each once more.
    assert torch.equal(other, ids()[[0, 1, 0]][:, [0, 1, 2, 3, 4, 5, 0]])
    assert torch.equal(one, ids()[:1, :1])


def test_no_free_size_has_no_trials() -> None:
    found = trace(nn.Linear(4, 4), (torch.ones(4),))
    assert trials_of(found.signature.guards, [torch.ones(4)]) is None


def test_a_model_of_one_mode_is_called_three_times(seen: Seen) -> None:
    found = traced(Tagger(), (ids(),), {})
    assert seen == [(False, (2, 6)), (False, (1, 1)), (True, (3, 7))]
    assert [c.condition.op for c in found.signature.guards.conditions].count("ge") >= 2


def test_a_model_of_two_modes_is_looked_at_longer(seen: Seen) -> None:
    class Normed(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(super().forward(ids).transpose(1, 2))

    traced(Normed(), (ids(),), {})
    assert (False, (2, 6)) in seen and (True, (2, 6)) in seen and len(seen) > 3


class Quartets(nn.Module):
    """Doubles what has one token more than quartets of them, which torch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, 3] -> [B, L, 3]"""
        return self.layer(x) * (2 if x.shape[1] % 4 == 1 else 1)


def test_another_size_is_looked_for_as_far_as_the_guards_ask() -> None:
    x = torch.ones(2, 5, 3)
    conditions = traced(Quartets(), (x,), {}).signature.guards.conditions
    taken = [n for n in range(2, 15) if all(guard.holds([(2, n, 3)]) for guard in conditions)]
    assert taken == [5, 9, 13]


ODD: dict[str, Callable[[Tagger, Tensor], bool]] = {
    "more rows": lambda _, ids: ids.shape[0] > 2,
    "more tokens": lambda _, ids: ids.shape[1] > 6,
    "one row": lambda _, ids: ids.shape[0] == 1,
    "one token": lambda _, ids: ids.shape[1] == 1,
    "the last token": lambda _, ids: bool((ids == 10).any()),
    "two tokens in evaluation": lambda self, ids: not self.training and ids.shape[1] > 1,
    "without gradients": lambda self, ids: not torch.is_grad_enabled(),
}


@pytest.mark.parametrize("name", list(ODD))
def test_what_no_trace_sees_is_fixed_or_refused(name: str) -> None:
    model = Tagger(ODD[name]).eval()
    try:
        found = traced(model, (ids(),), {})
    except TraceError:
        return
    for batch, length in ((2, 6), (3, 6), (2, 7), (1, 6), (2, 1), (3, 7), (1, 1)):
        given = ids(batch, length)
        shapes = [tuple(given.shape)]
        if all(guard.holds(shapes) for guard in found.signature.guards.conditions):
            # What the guards let through is what the model computes.
            computed = torch.fx.Interpreter(found.root, graph=found.graph).run(given)
            with torch.no_grad():
                expected = model(given)
            assert torch.allclose(computed[0], expected, atol=1e-12), (batch, length)


@pytest.mark.parametrize("least", [0, 1, 2])
def test_another_path_in_training_mode_is_said(least: int) -> None:
    found = traced(Tagger(lambda self, ids: self.training and ids.shape[0] > least), (ids(),), {})
    assert any(note.startswith(NO_TRAINING) for note in found.notes)


class Padded(nn.Module):
    """torch's own encoder, whose fast path writes zeros where the mask hides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.table, self.layers = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 1)

    def forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """ids, hidden [B, L] -> [B, L, 8]"""
        return self.layers(self.table(ids), src_key_padding_mask=hidden)


def test_the_fast_path_of_an_encoder_is_said() -> None:
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 4:] = True
    model = Padded().eval()
    found = traced(model, (ids(), hidden), {})
    assert any("fast path" in note for note in found.notes)
    other = torch.zeros(3, 5, dtype=torch.bool)
    other[2, 3:] = True
    computed = torch.fx.Interpreter(found.root, graph=found.graph).run(ids(3, 5), other)[0]
    with torch.no_grad():
        expected = model(ids(3, 5), other)
    assert torch.allclose(computed[~other], expected[~other], atol=1e-5)
    assert not expected[other].any() and computed[other].any()
