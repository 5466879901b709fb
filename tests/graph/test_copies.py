"""Nothing of the user's model differs after it was looked at, whatever its forward writes."""

from __future__ import annotations

import copy
import logging
import random
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.graph.copies import spare


class Codebook(nn.Module):
    """Vector quantisation whose codes follow the batch, by every way of writing there is."""

    codes: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("codes", torch.randn(6, 8))
        self.register_buffer("counts", torch.zeros(6))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        h = self.up(x)
        chosen = torch.cdist(h, self.codes).argmin(-1)
        if self.training:
            self.codes.data.copy_(self.codes * 0.9 + 0.1 * h.detach().mean(0))
            self.counts = self.counts + torch.bincount(chosen, minlength=6)
            self.frozen.data.mul_(1.01)
            self.seen.append(len(x))
        random.random(), np.random.rand(), torch.rand(1)
        return self.down(h + (self.codes[chosen] - h).detach() * self.frozen)


class FirstCall(nn.Module):
    """Attributes that are made at the first call, as in YOLO's heads."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.anchors = None, torch.empty(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        if self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.arange(x.shape[0])[:, None] / 7
        return self.down(self.up(x) + self.anchors)


class ThatCannotBeCopied(Codebook):
    """A lock inside: `copy.deepcopy` raises."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Failing(Codebook):
    """Writes, then fails."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> never"""
        self.codes.zero_(), self.frozen.data.zero_()
        raise RuntimeError("no")


class Norms(nn.Module):
    """Running statistics and a weight that is made of others at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.spectral_norm(nn.Linear(5, 8))
        self.norm, self.down = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        return self.down(self.norm(self.up(x)))


MODELS = (Codebook, FirstCall, ThatCannotBeCopied, Failing, Norms)
each_model = pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)


def everything(model: nn.Module) -> dict[str, Any]:
    """Every value, object and mode of a model, and all random states."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        held = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        held |= module._parameters | module._buffers
        for key, value in held.items():
            out[f"{name}.{key}"] = (id(value), copy.deepcopy(_bits(value)))
    state = np.random.get_state()
    return out | {
        "python": random.getstate(),
        "numpy": (state[1].tobytes(), *state[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().contiguous().numpy().tobytes(), value.requires_grad
    return value if isinstance(value, (bool, int, list, tuple)) else None


def example() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def look(verb: str, model: nn.Module, folder: Any) -> None:
    if verb == "inspect":
        mk.inspect(model, (example(),), nesting="sliced")
    else:
        doll = mk.convert(model, (example(),), sizes=[0.5, 1.0], nesting="sliced")
        mk.slice(doll, doll.sizes[0])
        mk.save(doll, folder / "doll")


@each_model
@pytest.mark.parametrize("verb", ["inspect", "convert"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_model_changes(
    make: Callable[[], nn.Module], verb: str, training: bool, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model = make().train(training)
    given = example()
    before = everything(model)
    try:
        look(verb, model, tmp_path)
    except MatryoshkafyError:
        assert make is Failing
    assert everything(model) == before
    assert torch.equal(given, example())


def test_inputs_are_not_written() -> None:
    class Writes(Norms):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    x = example()
    mk.convert(Writes().eval(), (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert torch.equal(x, example())


def test_a_model_that_makes_attributes_is_exported() -> None:
    model = FirstCall()
    doll = mk.convert(model, (example(),), sizes=[0.5, 1.0], nesting="sliced")
    assert not any(r.startswith("specialised") for r in doll.plan.remarks)
    assert model.shape is None and torch.equal(doll(example()), model(example()))


def test_a_spare_shares_memory_until_it_is_written() -> None:
    model = nn.Linear(4, 4)
    view = model.weight.detach()
    with spare(model) as twin:
        assert isinstance(twin, nn.Linear) and twin.weight is not model.weight
        assert torch.equal(twin.weight, model.weight)
        twin.weight.data.zero_()
        assert view.abs().sum() > 0
        with torch.no_grad():
            model.bias.fill_(3)
        assert not torch.equal(twin.bias, model.bias)


def test_ties_and_views_survive_in_a_spare() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("whole", torch.zeros(6))
    model.register_buffer("part", model.whole[:3])
    with spare(model) as twin:
        assert twin[1].weight is twin[0].weight
        twin.whole.fill_(1)
        assert twin.part.sum() == 3 and model.part.sum() == 0


class Branching(nn.Module):
    """torch.export gives up on it and prints its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        return self.down(-self.up(x) if x.sum() > 1e6 else self.up(x))


def test_two_threads_convert_and_leave_the_process_alone(capfd: Any) -> None:
    streams, level = (sys.stdout, sys.stderr), logging.root.manager.disable
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.root.addHandler(handler)
    results: list[Any] = []
    seen: list[Any] = []
    ready = threading.Barrier(3)

    def work() -> None:
        ready.wait()
        for _ in range(2):
            results.append(mk.convert(Branching(), (example(),), sizes=[0.5, 1.0]))

    def watch() -> None:
        ready.wait()
        while any(t.is_alive() for t in threads[:2]):
            seen.append((sys.stdout, sys.stderr) == streams)
            seen.append(logging.root.manager.disable == level)
            logging.warning("mine")

    threads = [threading.Thread(target=f) for f in (work, work, watch)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    logging.root.removeHandler(handler)
    assert len(results) == 4 and all(seen) and set(records) == {"mine"}
    assert "GraphModule" not in capfd.readouterr().err
    print("still open")


class Hooked(nn.Module):
    """Hooks that hold the model: in a cell, as a method, in a function inside a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        shifted = lambda x: x + self.shift  # noqa: E731  a closure over the model
        self.down.register_forward_pre_hook(lambda _, given: (given[0] * self.gain,))
        self.up.register_forward_hook(lambda _, __, out: shifted(out))
        self.activation = lambda x: torch.tanh(x) * self.gain.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        return self.down(self.activation(self.up(x)))


def test_functions_that_hold_the_model_hold_its_copy() -> None:
    model, x = Hooked(), torch.randn(4, 5)
    with spare(model) as twin:
        twin(x).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_what_a_hook_reads_nests_and_trains() -> None:
    model, x = Hooked(), torch.randn(4, 5)
    doll = mk.convert(model, x, sizes=[4, 8], nesting="sliced")
    doll(x).sum().backward()
    gradients = {name: p.grad for name, p in doll.named_parameters()}
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert mk.slice(doll, 4).state_dict()["gain"].shape == (4,)


class Closed(nn.Module):
    """Functions that hold parameters themselves, not the module that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        gain = self.gain = nn.Parameter(torch.ones(8))
        self.scaled = lambda x: x * gain
        self.last = partial(nn.functional.linear, weight=self.down.weight, bias=self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5] -> [N, 3]"""
        return self.last(self.scaled(self.up(x)).tanh())


def test_parameters_that_a_function_holds_nest_and_train() -> None:
    model, x = Closed(), torch.randn(4, 5)
    doll = mk.convert(model, x, sizes=[4, 8], nesting="sliced")
    assert not doll.plan.remarks
    doll(x).sum().backward()
    gradients = {name: p.grad for name, p in doll.named_parameters()}
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    shapes = {name: tuple(t.shape) for name, t in mk.slice(doll, 4).state_dict().items()}
    assert shapes["gain"] == (4,) and shapes["down.weight"] == (3, 4)
