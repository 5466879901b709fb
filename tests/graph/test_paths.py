"""Recorded paths: a call takes the path that was recorded, or is refused; never another answer.

The oracle is the model itself, and the small class with the weights of a slice.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.deploy.export import ExportError
from matryoshkafy.errors import GuardError, TraceError
from matryoshkafy.graph import paths
from matryoshkafy.serving import Session

Body = Callable[[nn.Module, Tensor, Tensor], Tensor]
ROWS = 6


class Model(nn.Module):
    """Two layers with a body between them that reads values."""

    def __init__(self, body: Body, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, width).double(), nn.Linear(width, 3).double()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4] -> [N, 3]"""
        return self.last(self.body(self, torch.tanh(self.first(x)), x))


def branches(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h * 2 if x.sum() > 0 else h * 3


def branches_on_units(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h * 2 if (h.square().sum(1) > 0).all() else h + x.sum()


def counts_in_numpy(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    scale = np.unique((x[:, 0].detach().numpy() > 0).astype(np.int64)).sum() + 1
    return h * float(scale)


def lists(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    signs = [1.0 if v > 0 else -1.0 for v in x[:, 0].gt(0).tolist()]
    return h * torch.tensor(np.array(signs))[:, None]


def indexes(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h + h[int(x[:, 0].argmax())] if bool(x.ne(0).any()) else h


def loops(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    for i in range(len(x)):
        if x[i, 0] > 0:
            h = h + h[i]
    return h


def finds_rows(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    if x.isnan().any():
        return h
    kept = x[x[:, 0] > 0]
    return h * (1 + kept.shape[0])


def cuts(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    if x.isnan().any():
        return h
    return h + h[: (x[:, 0] > 0).sum() + 1].mean(0)


def compares(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h * 2 if torch.equal(x[0] > 0, x[1] > 0) else h


def asks_weights(model: Any, h: Tensor, x: Tensor) -> Tensor:
    return h * 2 if model.last.bias.sum() > 0 else h * x.sum()


BODIES = [
    branches,
    branches_on_units,
    counts_in_numpy,
    lists,
    indexes,
    loops,
    finds_rows,
    cuts,
    compares,
    asks_weights,
]


def example(seed: int, rows: int = ROWS) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=draw, dtype=torch.float64)


def converted(body: Body, nesting: str = "sliced") -> tuple[Model, mk.Doll]:
    model = Model(body).eval()
    return model, mk.convert(model, (example(0),), sizes=[4, 8, 16], nesting=nesting).eval()


@pytest.mark.parametrize("body", BODIES)
def test_a_call_gets_the_model_s_answer_or_none(body: Body) -> None:
    model, doll = converted(body)
    part, small = mk.slice(doll, 8), Model(body, 8).eval()
    small.load_state_dict(part.state_dict())
    answered, refused = 0, 0
    for seed in range(40):
        x = example(seed)
        for mine, theirs in ((doll, model), (part, small)):
            try:
                found = mine(x)
            except GuardError as error:
                refused += 1
                assert "is something else in this call" in str(error)
            else:
                answered += 1
                torch.testing.assert_close(found, theirs(x), rtol=1e-12, atol=1e-12)
    assert answered >= 2, "the example itself"
    assert refused or body in (asks_weights, branches_on_units)


def above(x: Any) -> Any:
    return x[:, 0] > 0


# A number that each way makes of values.
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "where": lambda x: len(torch.where(above(x))[0]),
    "nonzero as a tuple": lambda x: torch.nonzero(above(x), as_tuple=True)[0].shape[0],
    "argwhere": lambda x: torch.argwhere(above(x)).shape[0],
    "unique": lambda x: torch.unique(above(x)).shape[0],
    "unique inverse": lambda x: torch.unique(above(x), return_inverse=True)[0].shape[0],
    "unique consecutive": lambda x: torch.unique_consecutive(above(x)).shape[0],
    "masked select": lambda x: torch.masked_select(x, x > 0).shape[0],
    "repeat interleave": lambda x: torch.repeat_interleave(above(x).long()).shape[0],
    "bincount": lambda x: torch.bincount(above(x).long() * 3).shape[0],
    "one hot": lambda x: F.one_hot((x[:2, 0] > 0).long().cumsum(0)).shape[1],
    "arange": lambda x: torch.arange(above(x).sum()).sum(),
    "zeros": lambda x: torch.zeros(above(x).sum() + 1, 1).shape[0],
    "repeat": lambda x: torch.ones(1).repeat(above(x).sum()).shape[0],
    "slice": lambda x: x[slice(0, above(x).sum() + 1)].sum(),
    "range": lambda x: sum(1 for _ in range(above(x).sum())),
    "list": lambda x: len([1] * int(above(x).sum())),
    "set": lambda x: len({float(v) for v in above(x).double()}),
    "iteration": lambda x: sum(2 if v else 1 for v in above(x)),
    "text": lambda x: float(f"{x.sum():.1f}"),
    "maximum": lambda x: max(x[:, 0]).item(),
    "tensor of tensors": lambda x: torch.tensor([x[0, 0], x[1, 0]]).sum(),
    "asarray": lambda x: float(np.asarray(x.detach()).sum() > 0),
    "membership": lambda x: 2 if 1 in above(x[:2]).long() else 3,
    "pack": lambda x: nn.utils.rnn.pack_padded_sequence(
        x[None], torch.tensor([int(above(x).sum()) + 1]), batch_first=True
    ).data.shape[0],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_values_make_is_that_of_the_call_or_refused(name: str) -> None:
    def body(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        return h if x.isnan().any() else h * NUMBERS[name](x)

    model, doll = converted(body)
    refused = 0
    for x in map(example, range(40)):
        try:
            found = doll(x)
        except GuardError:
            refused += 1
        else:
            torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
    assert refused


def test_places_that_nobody_counts_are_warned_of() -> None:
    def body(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        return h if x.isnan().any() else h * (x > 0).double().to_sparse()._nnz()

    _, doll = converted(body)
    with pytest.warns(UserWarning, match="branches on the values of tensors"):
        doll(example(0))


@pytest.mark.parametrize("body", BODIES)
def test_each_size_of_a_masked_doll_is_its_slice_or_refused(body: Body) -> None:
    _, doll = converted(body, "masked")
    for x in map(example, range(6)):
        for size in doll.sizes:
            try:
                found = doll.outputs(x)[size]
                expected = mk.slice(doll, size)(x)
            except GuardError:
                continue
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def other() -> Tensor:
    """The example's opposite: another path."""
    return -example(0)


def test_the_line_is_named_and_nothing_is_warned_of() -> None:
    _, doll = converted(branches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doll(example(0))
    with pytest.raises(GuardError, match=r"test_paths.py:\d+ \(branches\)"):
        doll(other())
    with pytest.raises(GuardError):
        doll.outputs(other())[8]


def test_weights_that_choose_another_path_are_refused_after_training() -> None:
    model, doll = converted(asks_weights)
    with torch.no_grad():
        model.last.bias.mul_(-1)
    with pytest.raises(GuardError, match="is something else in this call"):
        doll(example(0))


def test_every_copy_keeps_the_path(tmp_path: Path) -> None:
    _, doll = converted(branches)
    part = mk.slice(doll, 8)
    mk.save(doll, tmp_path / "doll")
    mk.save(part, tmp_path / "part")
    copies = [
        copy.deepcopy(doll),
        pickle.loads(pickle.dumps(part)),
        mk.load(tmp_path / "doll"),
        mk.load(tmp_path / "doll", size=8),
        mk.load(tmp_path / "part"),
        torch.compile(part, backend="eager"),
        torch.export.export(part, (example(0),)).module(),
    ]
    for each in copies:
        each(example(0))
        with pytest.raises(GuardError):
            each(other())


def test_a_file_of_another_runtime_keeps_the_path_or_is_refused(tmp_path: Path) -> None:
    _, doll = converted(branches)
    part = mk.slice(doll, 8)
    mk.export(part, tmp_path / "part.pt2", to="pt2", args=(example(0),))
    found = torch.export.load(tmp_path / "part.pt2").module()
    torch.testing.assert_close(found(example(0)), part(example(0)))
    with pytest.raises(RuntimeError, match="recorded along the path"):
        found(other())
    with pytest.raises(GuardError):
        mk.export(part, tmp_path / "other.pt2", to="pt2", args=(other(),))
    with pytest.raises(ExportError, match="export to pt2 instead"):
        mk.export(part, tmp_path / "part.onnx", args=(example(0),))


def test_a_session_that_grows_from_size_to_size_checks_the_path() -> None:
    _, doll = converted(branches, "masked")
    session = Session(doll)
    session.answer(example(0), size=4)
    torch.testing.assert_close(session.extend(16), mk.slice(doll, 16)(example(0)))
    with pytest.raises(GuardError):
        session.answer(other(), size=4)


def test_more_values_than_a_graph_holds_are_refused() -> None:
    def reads(_: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        return h * float(np.median(x.expand(paths.MOST, -1, -1).numpy()))

    with pytest.raises(TraceError, match="values of a tensor in Python"):
        mk.convert(Model(reads), (example(0),), sizes=[8, 16])


def test_a_line_out_of_a_file_cannot_write_to_the_terminal() -> None:
    with pytest.raises(GuardError) as caught:
        paths.path(torch.ones(1), [2.0], "\x1b[2J")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.complex64])
def test_values_of_every_type_are_compared(dtype: torch.dtype) -> None:
    value = torch.tensor([1, 0, 1]).to(dtype)
    numbers = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0] if dtype.is_complex else [1.0, 0.0, 1.0]
    paths.path(value, numbers, "")
    paths.path(torch.tensor([torch.nan, 1.0]), [float("nan"), 1.0], "")
    for wrong in (numbers[:-1], [0.0, *numbers[1:]]):
        with pytest.raises(GuardError):
            paths.path(value, wrong, "")


def test_each_size_of_a_masked_doll_checks_its_own_path() -> None:
    """What the tail holds differs from size to size: there a size may take another path."""

    def tail(model: Any, h: Tensor, x: Tensor) -> Tensor:
        scores = model.last(h)
        return h * 2 if (scores.sum() > 0) == (x.sum() > -1e9) else h * 3

    taken, refused = 0, 0
    for seed in range(12):
        torch.manual_seed(seed)
        model = Model(tail).eval()
        nn.init.normal_(model.first.weight)
        nn.init.normal_(model.last.weight)
        try:
            doll = mk.convert(model, (example(seed),), sizes=[4, 8, 16], nesting="masked").eval()
        except mk.MatryoshkafyError as error:
            assert "cannot be taken at every size" in str(error)
            continue
        for x in map(example, range(20)):
            try:
                expected = {size: mk.slice(doll, size)(x) for size in doll.sizes}
            except GuardError:
                refused += 1
                with pytest.raises(GuardError):
                    doll.outputs(x)[4].sum()
            else:
                taken += 1
                torch.testing.assert_close(dict(doll.outputs(x).items()), expected)
    assert taken and refused
