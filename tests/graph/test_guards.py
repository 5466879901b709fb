"""Inside its guards or not at all: another size is right, or it is refused by name and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import GuardError, TraceError
from matryoshkafy.graph.guards import Apply, Guard, Guards, Size, fixed
from matryoshkafy.graph.trace import trace

Body = Callable[[Tensor], Tensor]


class Words(nn.Module):
    """Token ids to features, through a body that looks at the sizes."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.last = nn.Embedding(20, 8).double(), nn.Linear(8, 8).double()
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, .., 8]"""
        return self.last(self.body(self.embed(ids)))


def branch(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 4 else x


def front(x: Tensor) -> Tensor:
    return x[:, :7]


def root(x: Tensor) -> Tensor:
    return x / math.sqrt(x.shape[1])


def loop_over_batch(x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(row) for row in x])


def loop_over_length(x: Tensor) -> Tensor:
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.tanh(state + x[:, t])
        out.append(state)
    return torch.stack(out, 1)


def padded(x: Tensor) -> Tensor:
    more = -x.shape[1] % 4
    x = nn.functional.pad(x, (0, 0, 0, more))
    return x.view(x.shape[0], -1, 4, 8).mean(2)


def triples(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1] // 3, 3, 8).sum(2)


def number(x: Tensor) -> Tensor:
    return x + torch.tensor(x.shape[1])


BODIES = (branch, front, root, loop_over_batch, loop_over_length, padded, triples, number)
SHAPES = ((3, 6), (2, 6), (5, 6), (1, 6), (3, 3), (3, 4), (3, 5), (3, 7), (3, 9), (3, 12), (1, 1))


def alone(x: Tensor) -> Tensor:
    """torch.export takes it for granted that a free size is not 1: no guard is left."""
    return -x if x.shape[0] == 1 else x


def hidden_length(x: Tensor) -> Tensor:
    """What differs while it is traced leaves no guard either."""
    return x / (6 if torch.compiler.is_exporting() else x.shape[1])


BODIES = (*BODIES, alone, hidden_length)
each_body = pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)


def ids(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


@each_body
def test_another_size_is_right_or_refused(body: Body) -> None:
    model = Words(body).eval()
    doll = mk.convert(model, (ids((3, 6)),), sizes=[4, 8], nesting="sliced")
    small = mk.slice(doll, 4)
    answered = 0
    for shape in SHAPES:
        x = ids(shape)
        try:
            answer = doll(x)
        except GuardError as error:
            assert "'ids' has size" in str(error)
            with pytest.raises(GuardError):
                small(x)
            continue
        torch.testing.assert_close(answer, model(x), rtol=1e-12, atol=1e-12)
        assert small(x).shape == answer.shape
        answered += 1
    assert answered


def test_what_is_fixed_is_said() -> None:
    said = {b: mk.inspect(Words(b).eval(), (ids((3, 6)),)).remarks for b in (root, hidden_length)}
    assert any("ids.shape[1] == 6, by" in r and "test_guards.py" in r for r in said[root])
    assert any("ids.shape[1] == 6, the traced graph" in r for r in said[hidden_length])


@pytest.mark.parametrize("shape", [(1, 6), (3, 1), (1, 1)])
def test_an_example_of_one_is_no_limit(shape: tuple[int, ...]) -> None:
    model = Words(torch.tanh).eval()
    doll = mk.convert(model, (ids(shape),), sizes=[4, 8], nesting="sliced")
    for other in ((1, 1), (1, 5), (4, 1), (3, 7)):
        torch.testing.assert_close(doll(ids(other)), model(ids(other)), rtol=1e-12, atol=1e-12)


def test_a_model_that_takes_one_row_alone_is_held_to_it() -> None:
    def body(x: Tensor) -> Tensor:
        if x.shape[0] != 1:
            raise ValueError("one row at a time")
        return x

    model = Words(body).eval()
    doll = mk.convert(model, (ids((1, 6)),), sizes=[4, 8], nesting="sliced")
    assert doll(ids((1, 9))).shape == (1, 9, 8)
    with pytest.raises(GuardError, match=r"ids\.shape\[0\] == 1 only"):
        doll(ids((2, 6)))


def test_a_refusal_names_input_dimension_range_and_line() -> None:
    doll = mk.convert(Words(branch).eval(), (ids((3, 6)),), sizes=[4, 8])
    with pytest.raises(GuardError) as caught:
        doll(ids((3, 4)))
    text = str(caught.value)
    assert "argument 'ids' has size 4 in dimension 1" in text
    assert "ids.shape[1] > 4" in text
    assert "test_guards.py:" in text and "(branch)" in text or "in branch" in text


def test_a_recorded_path_answers_for_the_sizes_of_the_example_alone() -> None:
    def body(x: Tensor) -> Tensor:
        return -x if x.sum() > 1e6 else x

    doll = mk.convert(Words(body).eval(), (ids((3, 6)),), sizes=[4, 8])
    doll(ids((3, 6)))
    for shape in ((2, 6), (3, 5)):
        with pytest.raises(GuardError, match=r"'ids' has size"):
            doll(ids(shape))


def test_the_batch_of_star_args_is_free() -> None:
    class Variadic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, *parts: Tensor, **more: Tensor) -> Tensor:
            return self.last(self.first(sum(parts) * more["scale"]))  # type: ignore[arg-type]

    def call(n: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (torch.randn(n, 3), torch.randn(n, 3)), {"scale": torch.randn(n, 1)}

    model = Variadic()
    args, kwargs = call(2)
    doll = mk.convert(model, args, kwargs, sizes=[4, 8], nesting="sliced")
    args, kwargs = call(5)
    torch.testing.assert_close(doll(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("given", ["one tensor twice", "the model's own"])
def test_an_example_that_is_one_tensor_stands_for_any(given: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.start = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x + self.start.sum()) + 2 * self.first(y)))

    model = Pair().eval()
    x = model.start if given == "the model's own" else torch.randn(2, 4)
    doll = mk.convert(model, (x, x), sizes=[4, 8], nesting="sliced")
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    for pair in ((a, b), (b, a)):
        torch.testing.assert_close(doll(*pair), model(*pair))


def test_inputs_of_one_symbol_must_agree() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.last(self.first(batch["x"] + batch["y"]))

    batch = {"x": torch.randn(2, 4, 3), "y": torch.randn(2, 4, 3)}
    doll = mk.convert(Two(), (batch,), sizes=[4, 8])
    doll({"x": torch.randn(5, 7, 3), "y": torch.randn(5, 7, 3)})
    with pytest.raises(GuardError, match=r"batch\['y'\]"):
        doll({"x": torch.randn(5, 7, 3), "y": torch.randn(1, 7, 3)})


def test_ranks_and_kinds_are_guarded() -> None:
    doll = mk.convert(
        nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), (torch.randn(2, 3),), sizes=[4, 8]
    )
    with pytest.raises(GuardError, match="2 dimensions"):
        doll(torch.randn(2, 2, 3))
    with pytest.raises(GuardError, match="float values"):
        doll(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(GuardError, match="expected a tensor"):
        doll(3.0)


class WithArray(Words):
    """Weights of the rows beside the ids, as numpy holds them."""

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """ids [N, L], weights [N] -> [N, L, 8]"""
        return super().forward(ids) * torch.as_tensor(weights)[:, None, None]


def test_arrays_of_numpy_are_inputs_like_any_other() -> None:
    model = WithArray(torch.tanh).eval()
    doll = mk.convert(model, (ids((3, 6)), np.arange(3.0)), sizes=[4, 8], nesting="sliced")
    other = (ids((5, 4)), np.arange(5.0) / 7)
    torch.testing.assert_close(doll(*other), model(*other))


def test_random_numbers_of_numpy_are_refused() -> None:
    def body(x: Tensor) -> Tensor:
        return x * float(np.random.rand())

    with pytest.raises(TraceError, match="that are not torch's"):
        mk.convert(Words(body).eval(), (ids((3, 6)),), sizes=[4, 8])


@each_body
def test_guards_survive_json(body: Body) -> None:
    guards = trace(Words(body).eval(), (ids((3, 6)),)).signature.guards
    assert Guards.from_dict(json.loads(json.dumps(guards.to_dict()))) == guards


A, B = Size(0, 0), Size(0, 1)
GUARDS = Guards(
    names=("x",),
    ranks=(2,),
    kinds=("float",),
    conditions=(Guard(Apply("eq", (Apply("mod", (A, 4)), 0)), "f.py:3 (g)"), fixed(0, 1, 8)),
)


def test_the_algebra_of_conditions() -> None:
    GUARDS.check([torch.zeros(8, 8)])
    with pytest.raises(GuardError, match=r"x\.shape\[0\] % 4\) == 0 only \(fixed at f\.py:3"):
        GUARDS.check([torch.zeros(6, 8)])
    assert GUARDS.free == (A,)
    GUARDS.resized({B: 2}).check([torch.zeros(8, 2)])
    with pytest.raises(GuardError, match="because"):
        GUARDS.with_fixed({A: 4}, "because").check([torch.zeros(8, 8)])
    by_zero = Guard(Apply("ge", (Apply("floordiv", (B, A)), 1)))
    assert not by_zero.holds([(0, 3)]) and by_zero.holds([(2, 3)])


DEEP: list[object] = ["not", 1]
for _ in range(400):
    DEEP = ["not", DEEP]


@pytest.mark.parametrize(
    "condition",
    [3, [], ["pow", 2, 9], ["eq", 1], {"leaf": 1, "dim": 0}, ["eq", {"leaf": 3, "dim": 0}, 1],
     ["eq", {"leaf": 0, "dim": 2}, 1], ["eq", True, 1], ["eq", 2**70, 1], ["add", 1, 2], DEEP],
)  # fmt: skip
def test_hostile_guards_are_refused(condition: object) -> None:
    saved = GUARDS.to_dict() | {"conditions": [[condition, ""]]}
    with pytest.raises(GuardError, match="damaged"):
        Guards.from_dict(saved)


def test_an_example_of_length_one_is_taken_where_other_lengths_are_fixed() -> None:
    torch.manual_seed(0)
    model = Spoken()
    x = torch.randn(3, 1, 6)
    doll = mk.convert(model, x, sizes=[4, 8], nesting="sliced")
    torch.testing.assert_close(doll(x), model(x))


class Spoken(nn.Module):
    """A recurrent layer over what was folded into rows and back by the length of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state = nn.Linear(6, 8), nn.LSTM(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 6] -> [L, N, 2]"""
        frames, batch, units = x.permute(1, 0, 2).shape
        inner = torch.tanh(self.inner(x.permute(1, 0, 2).reshape(-1, units)))
        return self.last(self.state(inner.reshape(frames, batch, -1))[0])
