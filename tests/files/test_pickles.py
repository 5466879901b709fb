"""pickles.py: models travel through pickle, torch.save, deepcopy and spawned workers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.utils import _pytree as pytree

import matryoshkafy as mk
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.outputs import Outputs
from tests.small_models import MODELS, build, converted

KINDS = ("doll", "slice")


def model_of(name, nesting, kind):
    doll, inputs = converted(name, nesting), MODELS[name][1]()
    next(iter(doll.parameters())).requires_grad_(False)  # a frozen weight travels as one
    return (doll if kind == "doll" else mk.slice(doll, 8)), inputs


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same(one, other):
    one, other = pytree.tree_leaves(one), pytree.tree_leaves(other)
    assert len(one) == len(other) > 0
    assert all(map(torch.equal, one, other))


def ties(named):
    return {(a, b) for a, p in named.items() for b, q in named.items() if p is q}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nesting", ["masked", "sliced"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("through", [by_pickle, by_torch, copy.deepcopy])
def test_a_model_comes_back_as_it_was(name, nesting, kind, through):
    model, inputs = model_of(name, nesting, kind)
    again = through(model)
    one, other = state_of(model), state_of(again)
    assert list(one) == list(other) and ties(one) == ties(other)
    assert list(model.state_dict()) == list(again.state_dict())
    for tensor, found in zip(one.values(), other.values(), strict=True):
        assert torch.equal(tensor, found) and tensor.requires_grad == found.requires_grad
        assert type(tensor) is type(found) and tensor.data_ptr() != found.data_ptr()
    with torch.no_grad():
        assert_same(model(*inputs), again(*inputs))
        assert_same(mk.slice(model, 4)(*inputs), mk.slice(again, 4)(*inputs))
        if kind == "doll":
            assert_same(dict(model.outputs(*inputs)), dict(again.outputs(*inputs)))


def test_modes_and_attributes_travel():
    model, inputs = build("images")
    model.config = {"name": "x"}
    doll = mk.convert(model, inputs, sizes=[4, 8, 16], nesting="sliced").train()
    for again in (by_pickle(doll), copy.deepcopy(doll)):
        assert again.training and again.config == {"name": "x"}
        assert not copy.deepcopy(again.eval()).training


def test_a_tuned_slice_keeps_what_training_wrote_into_the_zeros():
    small, _ = model_of("tied", "masked", "slice")
    for parameter in small.parameters():
        parameter.data.add_(1.0)
    for again in (by_pickle(small), copy.deepcopy(small)):
        assert_same(dict(small.state_dict()), dict(again.state_dict()))


def test_copies_train_apart():
    doll, inputs = model_of("normed", "sliced", "doll")
    again = copy.deepcopy(doll)
    again(*inputs).sum().backward()
    assert all(p.grad is None for p in doll.parameters())
    assert any(p.grad is not None for p in again.parameters())


def test_outputs_are_computed_and_travel():
    doll, inputs = model_of("normed", "masked", "doll")
    with torch.no_grad():
        outputs = doll.outputs(*inputs)
    again = by_pickle(outputs)
    assert isinstance(again, Outputs) and again == outputs


def worker(rank, models, inputs, queue):
    """Compute in another process."""
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put([model(*inputs).sum().item() for model in models])


def test_spawned_workers_are_given_models():
    made = [model_of("normed", "sliced", kind) for kind in KINDS]
    models, inputs = [m for m, _ in made], made[0][1]
    with torch.no_grad():
        expected = [model(*inputs).sum().item() for model in models]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(worker, (models, inputs, queue), nprocs=1)
    assert queue.get() == pytest.approx(expected, abs=0)


def test_a_pickle_holds_no_code():
    small, _ = model_of("tied", "masked", "slice")
    data = pickle.dumps(small)
    assert b"def forward" not in data and b"torch.fx" not in data
