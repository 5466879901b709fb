"""Cleaning: however a model spells an op, the cleaned graph computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import matryoshkafy as mk
from matryoshkafy.graph.nodes import bound_args, op_key, set_arg
from matryoshkafy.graph.trace import trace

Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A layer, a body that may write in place, two layers."""

    def __init__(self, body: Body, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, width).double(), nn.LazyLinear(6).double()
        self.body, self.head = body, nn.Linear(6, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        """x [2, 4, 3] -> [2, .., 5]"""
        return self.head(torch.tanh(self.last(self.body(self.first(x)))))


def example() -> Tensor:
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def write_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.5
    y[:, 1:3] += x[:, 1:3]
    return y


def write_view(x: Tensor) -> Tensor:
    y = x * 1
    part = y.view(2, 4, 4, 2)
    part[:, :, 0].mul_(3)
    return y + part.flatten(2)


def read_before_and_after(x: Tensor) -> Tensor:
    y = x * 2
    before = y + 0
    y.add_(1).relu_()
    return before - y


def write_turned(x: Tensor) -> Tensor:
    y = x + 0
    y.transpose(1, 2)[:, 0].zero_()
    return y


def write_chain(x: Tensor) -> Tensor:
    y = x + 0
    inner = y[:, 1:]
    inner[:, :, 0].fill_(2)
    y[:, 0].sigmoid_()
    return torch.cat([y, inner], 1)


def write_index(x: Tensor) -> Tensor:
    y = x + 0
    y[:, [0, 2]] = y[:, [2, 0]]
    return y


def write_masked(x: Tensor) -> Tensor:
    return (x + 0).masked_fill_(x > 0, 0.0).clamp_(-0.5)


def stale_view(x: Tensor) -> Tensor:
    """A view taken before a write and read after it sees what was written."""
    y = x + 0
    view = y[:, 0]
    y.mul_(2)
    return y + view.unsqueeze(1)


def copied(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2].copy_(x[:, ::2])
    return y


def cast(x: Tensor) -> Tensor:
    return x.to(torch.float64).detach().contiguous().type_as(x)[:]


def dropped(x: Tensor) -> Tensor:
    return F.dropout(F.dropout1d(x, 0.5, False), 0.5, False)


def filled(x: Tensor) -> Tensor:
    """Memory that starts as anything, filled piece by piece."""
    y, z = torch.empty_like(x), x.new_empty(x.shape)
    y[:, 1:], z[:, 0] = x[:, 1:], x[:, 0]
    y[:, 0], z[:, 1:] = 1.0, torch.empty(1, dtype=x.dtype).fill_(2)
    return y * z


BODIES = (filled, write_slice, write_view, read_before_and_after, write_turned, write_chain,
          write_index, write_masked, stale_view, copied, cast, dropped)  # fmt: skip
each_body = pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)


def model_of(body: Body) -> Around:
    model = Around(body).eval()
    model(example())
    return model


@each_body
def test_the_cleaned_graph_is_the_model(body: Body) -> None:
    model = model_of(body)
    expected = model(example())
    cleaned = trace(model, (example(),))
    actual = fx.GraphModule(cleaned.root, cleaned.graph)(example())
    torch.testing.assert_close(actual[0], expected, rtol=1e-12, atol=1e-12)


class Branching(Around):
    """A branch on a value: torch.export gives up, and the path of the example is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        """x [2, 4, 3] -> [2, .., 5]"""
        return -super().forward(x) if x.sum() > 1e6 else super().forward(x)


@each_body
def test_a_recorded_path_knows_what_is_a_view(body: Body) -> None:
    model = Branching(body).eval()
    expected = model(example())
    traced = trace(model, (example(),))
    assert any(note.startswith("specialised") for note in traced.notes)
    actual = fx.GraphModule(traced.root, traced.graph)(example())
    torch.testing.assert_close(actual[0], expected, rtol=1e-12, atol=1e-12)


def test_uninitialised_memory_is_not_in_the_graph() -> None:
    graph = trace(model_of(filled), (example(),)).graph
    assert not [n for n in graph.nodes if n.op == "call_function" and "empty" in op_key(n)]


@each_body
def test_nothing_writes_any_more(body: Body) -> None:
    for node in trace(model_of(body), (example(),)).graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            assert not node.target._schema.is_mutable, node


@each_body
@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_what_was_cleaned_keeps_the_laws(body: Body, nesting: str) -> None:
    model = model_of(body)
    doll = mk.convert(model, (example(),), sizes=[0.25, 0.5, 1.0], nesting=nesting)
    assert mk.verify(doll, (example(),)).passed


def test_dropout_follows_the_mode() -> None:
    model = Around(nn.Dropout(0.5)).eval()
    x = example()
    model(x)
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced")
    assert torch.equal(doll(x), model(x))
    assert not torch.equal(doll.train()(x), doll(x))
    assert torch.equal(doll.eval()(x), model(x))


def test_batch_norm_follows_the_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    doll = mk.convert(model, (x,), sizes=[4, 8], nesting="sliced").train()
    layer = model[1]
    assert isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
    with torch.no_grad():
        hidden = model[0](x)
        normed = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + layer.eps).sqrt()
        expected = model[3](torch.relu(normed * layer.weight + layer.bias))
        torch.testing.assert_close(doll(x), expected, rtol=1e-10, atol=1e-10)


def test_arguments_by_the_names_of_the_schema() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.softmax.int, (x, -1))
    assert bound_args(node) == {"self": x, "dim": -1, "dtype": None}
    assert op_key(node) == "softmax"
    set_arg(node, "dim", 1)
    set_arg(node, "dtype", torch.float64)
    assert node.args == (x, 1) and node.kwargs == {"dtype": torch.float64}


class Layers(nn.Module):
    """Two layers of fused attention with one boolean mask, which may hide a whole row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, T, 3], mask [N, T, T] -> [N, T, 5]"""
        h, mask = self.first(x).unsqueeze(1), mask.unsqueeze(1)
        for _ in range(2):
            h = h + F.scaled_dot_product_attention(h, h, h, attn_mask=mask)
        return self.last(h.squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_share_the_conversion_of_a_boolean_mask(dtype: torch.dtype) -> None:
    x = example().float()
    mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    mask[0, 2] = False
    model = Layers().eval()
    doll = mk.convert(model, (x, mask), sizes=[0.5, 1.0], nesting="sliced")
    names = [op_key(n) for n in doll._trace.graph.nodes if n.op == "call_function"]
    assert names.count("where") == 1
    model.to(dtype), doll.to(dtype)
    assert torch.equal(doll(x.to(dtype), mask), model(x.to(dtype), mask))
    assert mk.verify(doll, (x.to(dtype), mask)).passed


def test_a_shared_mask_follows_autocast() -> None:
    x, mask = example().float(), torch.ones(2, 4, 4, dtype=torch.bool).tril()
    model = Layers().eval()
    doll = mk.convert(model, (x, mask), sizes=[0.5, 1.0], nesting="sliced")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(doll(x, mask), model(x, mask))


class WithoutAutocast(nn.Module):
    """A block that autocast leaves alone, recorded because of a branch on a value."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.first, self.last, self.enabled = nn.Linear(4, 8), nn.Linear(8, 3), enabled

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4] -> [N, 3]"""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            h = self.first(x)
            h = -h if h.sum() > 1e6 else h
        return self.last(h.float())


def test_autocast_on_a_recorded_path_is_left_out_or_refused() -> None:
    x, model = torch.randn(3, 4), WithoutAutocast(enabled=False)
    doll = mk.convert(model, (x,), sizes=[4, 8], nesting="sliced")
    torch.testing.assert_close(doll(x), model(x))
    with pytest.raises(mk.MatryoshkafyError, match="does not compute what the model computes"):
        mk.convert(WithoutAutocast(enabled=True), (x,), sizes=[4, 8])
