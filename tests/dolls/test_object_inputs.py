"""Inputs that are objects: a dataclass, a namespace, a dictionary of a class of its own."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.batches import arguments_of
from matryoshkafy.errors import MatryoshkafyError, TraceError

WIDTH, ITEMS = 16, 20


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """Items and which of them count."""

    ids: Tensor
    mask: Tensor


@dataclasses.dataclass
class Batch:
    """A batch with what the forward reads, and what it does not."""

    users: Tensor
    history: History
    more: dict[str, Tensor]
    kind: str = "plain"
    number: int = 0
    _weights: Tensor | None = None

    @property
    def weights(self) -> Tensor | None:
        """What each row weighs."""
        return self._weights


class Model(nn.Module):
    """Users, the mean of their histories, and a head; all of it reached through a batch."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.users = nn.Embedding(ITEMS, width), nn.Embedding(9, width)
        self.mixed, self.head = nn.Linear(width, width), nn.Linear(width, 4)
        self.double()

    def forward(self, batch: Any, scale: float = 1.0) -> dict[str, Tensor]:
        """batch of N users with histories [N, L] -> {"scores": [N, 4]}"""
        if batch.kind == "doubled":
            scale = scale * 2
        history = self.items(batch.history.ids) * batch.history.mask[..., None]
        hidden = torch.tanh(self.mixed(history.sum(1) + self.users(batch.users)))
        scores = self.head(hidden) * scale + batch.more["shift"][:, None]
        if getattr(batch, "bias", None) is not None:
            scores = scores + batch.bias
        return {"scores": scores * batch.weights[:, None]}


def batch_of(rows: int, length: int, **other: Any) -> Batch:
    draw = torch.Generator().manual_seed(rows * length)

    def real(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    ids = torch.randint(0, ITEMS, (rows, length), generator=draw)
    users = torch.randint(0, 9, (rows,), generator=draw)
    history = History(ids, real(rows, length))
    given: dict[str, Any] = {"number": rows, "_weights": real(rows), **other}
    return Batch(users, history, {"shift": real(rows)}, **given)


def converted(nesting: str = "sliced") -> tuple[Model, mk.Doll]:
    model = Model().eval()
    return model, mk.convert(model, (batch_of(4, 5),), sizes=[4, 8, 16], nesting=nesting).eval()


@pytest.mark.parametrize(("rows", "length"), [(4, 5), (7, 3), (1, 9)])
def test_other_objects_of_the_class_are_computed_as_the_model_does(rows: int, length: int) -> None:
    model, doll = converted()
    batch = batch_of(rows, length)
    for given, named in (((batch,), {}), ((), {"batch": batch})):
        expected = model(*given, **named)["scores"]
        torch.testing.assert_close(doll(*given, **named)["scores"], expected, rtol=1e-12, atol=0)


def test_a_slice_is_the_small_model_on_the_same_objects() -> None:
    _, doll = converted()
    part, small, batch = mk.slice(doll, 8), Model(8), batch_of(6, 4)
    small.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(batch)["scores"], small(batch)["scores"], rtol=1e-12, atol=0)


def test_each_size_of_a_masked_doll_is_its_slice() -> None:
    _, doll = converted("masked")
    batch = batch_of(6, 4)
    for size in doll.sizes:
        found = doll.outputs(batch)[size]["scores"]
        expected = mk.slice(doll, size)(batch)["scores"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_takes_the_objects(tmp_path: Path) -> None:
    model, doll = converted()
    mk.save(doll, tmp_path / "doll")
    batch = batch_of(3, 6)
    found = mk.load(tmp_path / "doll")(batch)["scores"]
    torch.testing.assert_close(found, model(batch)["scores"], rtol=1e-12, atol=0)


def test_what_a_forward_does_not_read_may_differ_and_what_it_reads_may_not() -> None:
    _, doll = converted()
    doll(batch_of(4, 5, number=99))
    with pytest.raises(TraceError, match=r"'batch.kind' is 'doubled', .* traced with 'plain'"):
        doll(batch_of(4, 5, kind="doubled"))


def test_an_attribute_that_the_example_lacked_is_refused() -> None:
    _, doll = converted()
    batch: Any = batch_of(4, 5)
    batch.unread = torch.ones(4)
    doll(batch)
    batch.bias = torch.ones(4)
    with pytest.raises(TraceError, match="with .*bias.* was given; the model was traced with a"):
        doll(batch)


def test_an_object_of_another_class_is_refused() -> None:
    _, doll = converted()
    with pytest.raises(TraceError, match="of the class History .* traced with a Batch"):
        doll(batch_of(4, 5).history)
    with pytest.raises(TraceError, match="'batch' has structure"):
        doll(torch.ones(3))


class Attributes(dict[str, Any]):
    """A dictionary whose keys are attributes, in the way that it is often written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Plain:
    """A class with an attribute."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Reader(nn.Module):
    """Reads x of whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16).double(), nn.Linear(16, 3).double()

    def forward(self, batch: Any) -> Tensor:
        """batch with x [N, 6] -> [N, 3]"""
        x = batch.x if hasattr(batch, "x") else batch["x"]
        return self.last(torch.tanh(self.first(x)))


MAKERS: dict[str, Callable[[Tensor], Any]] = {
    "namespace": lambda x: types.SimpleNamespace(x=x),
    "class": Plain,
    "keys that are attributes": lambda x: Attributes(x=x),
    "dictionary of a library": lambda x: UserDict(x=x),
    "array": lambda x: Plain(x.numpy()),  # type: ignore[arg-type]
    "within a list": lambda x: types.SimpleNamespace(x=[Plain(x)][0].x),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_object_is_taken(name: str) -> None:
    made, model = MAKERS[name], Reader().eval()
    rows = [torch.rand(n, 6, dtype=torch.float64) for n in (4, 7)]
    doll = mk.convert(model, (made(rows[0]),), sizes=[4, 8, 16], nesting="sliced").eval()
    for x in rows:
        torch.testing.assert_close(doll(made(x)), model(Plain(x)), rtol=1e-12, atol=0)


def test_a_dictionary_of_a_class_of_its_own_may_be_the_example_itself() -> None:
    model, x = Reader().eval(), torch.rand(4, 6, dtype=torch.float64)
    doll = mk.convert(model, Attributes(x=x), sizes=[4, 8, 16], nesting="sliced").eval()
    torch.testing.assert_close(doll(Attributes(x=x)), model(Plain(x)), rtol=1e-12, atol=0)
    with pytest.raises(TraceError, match="with mask, x was given"):
        doll(Attributes(x=x, mask=x))


class Judge(nn.Module):
    """Scores by a method beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reader()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 6] -> [N, 3]"""
        return self.inner(Plain(x))

    def predict(self, batch: Plain) -> Tensor:
        """batch with x [N, 6] -> [N]"""
        return self.inner(batch).sum(1)


def test_another_method_takes_objects() -> None:
    model, batch = Judge().eval(), Plain(torch.rand(5, 6, dtype=torch.float64))
    doll = mk.convert(model, batch, sizes=[8, 16], nesting="sliced", method="predict").eval()
    torch.testing.assert_close(doll(batch), model.predict(batch), rtol=1e-12, atol=0)


def test_an_object_is_one_argument_of_a_batch() -> None:
    batch = Plain(torch.ones(2))
    assert arguments_of(batch) == ((batch,), {})


class Lazy(Plain):
    """Computes x at its first use, and keeps it."""

    @functools.cached_property
    def doubled(self) -> Tensor:
        """Twice x."""
        return self.x * 2


class OfLazy(Reader):
    """Reads what its input computes."""

    def forward(self, batch: Any) -> Tensor:
        """batch with doubled [N, 6] -> [N, 3]"""
        return super().forward(Plain(batch.doubled))


@pytest.mark.parametrize("computed", [False, True])
def test_what_an_object_computes_of_itself_is_computed_of_each(computed: bool) -> None:
    model, rows = OfLazy().eval(), [torch.rand(n, 6, dtype=torch.float64) for n in (4, 7)]
    first = Lazy(rows[0])
    if computed:
        assert first.doubled.shape == (4, 6)
    doll = mk.convert(model, first, sizes=[8, 16], nesting="sliced").eval()
    assert ("doubled" in vars(first)) == computed
    for x in rows:
        torch.testing.assert_close(doll(Lazy(x)), model(Lazy(x)), rtol=1e-12, atol=0)


class Writer(Reader):
    """Keeps a value in its input."""

    def forward(self, batch: Any) -> Tensor:
        """batch with x [N, 6] -> [N, 3]"""
        batch.x = batch.x * 2
        return super().forward(batch)


def test_a_forward_that_sets_an_attribute_is_refused_by_name() -> None:
    batch = Plain(torch.rand(4, 6, dtype=torch.float64))
    with pytest.raises(MatryoshkafyError, match="sets 'x' of an object among its inputs"):
        mk.convert(Writer(), batch, sizes=[8, 16])
    assert list(vars(batch)) == ["x"]


class Keeper(Reader):
    """Keeps what it computed in an object that comes in empty, as a cache does."""

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        """x [N, 6], cache -> [N, 3]"""
        seen = getattr(cache, "seen", None)
        cache.seen = x
        return super().forward(Plain(x if seen is None else x + seen))


def test_an_object_that_is_filled_by_a_call_is_refused_and_left_empty() -> None:
    cache = types.SimpleNamespace(name="cache")
    with pytest.raises(TraceError, match=r"keeps tensors in its input 'cache' \(a Simple"):
        mk.convert(Keeper(), (torch.rand(4, 6, dtype=torch.float64), cache), sizes=[8, 16])
    assert vars(cache) == {"name": "cache"}


class Setter(Reader):
    """Keeps a value in a dictionary among its inputs."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """batch with x [N, 6] -> [N, 3]"""
        batch["hidden"] = batch["x"] * 2
        return super().forward({"x": batch["hidden"]})


def test_a_forward_that_sets_a_key_is_told_of() -> None:
    batch = {"x": torch.rand(4, 6, dtype=torch.float64)}
    doll = mk.convert(Setter(), (batch,), sizes=[8, 16])
    assert any("sets its input batch['hidden']" in remark for remark in doll.plan.remarks)
    assert list(batch) == ["x"]
    plain = mk.convert(Reader(), (batch,), sizes=[8, 16])
    assert not any("sets its input" in remark for remark in plain.plan.remarks)


class Returner(Reader):
    """Returns an object of a class of its own."""

    def forward(self, batch: Any) -> Any:
        """batch with x [N, 6] -> an object with x [N, 3]"""
        return Plain(super().forward(batch))


def test_an_object_that_is_returned_is_refused_by_name() -> None:
    batch = Plain(torch.rand(4, 6, dtype=torch.float64))
    with pytest.raises(TraceError, match="returns Plain, whose tensors a graph does not see"):
        mk.convert(Returner(), batch, sizes=[8, 16])
