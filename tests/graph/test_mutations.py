"""Writes in place, through every kind of view: values, gradients, other sizes are the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.errors import TraceError
from matryoshkafy.graph.trace import trace

Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A layer, a body that writes, a layer; with `record` torch.export gives up on it."""

    def __init__(self, body: Body, *, record: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.last = nn.Linear(8, 5).double()
        self.body, self.record = body, record

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, 3] -> [N, L, 5]"""
        if self.record and x.sum() > 1e6:
            return x
        return self.last(torch.tanh(self.body(self.first(x))))


def moved(x: Tensor) -> Tensor:
    y = x + 0
    y.movedim(2, 0)[1:3].mul_(2)
    y.movedim((0, 1), (1, 0))[0] += 1
    return y


def unflattened(x: Tensor) -> Tensor:
    y = x + 0
    y.unflatten(-1, (2, 4))[..., 1, :].mul_(3)
    return y


def turned(x: Tensor) -> Tensor:
    y = x + 0
    y.mT[:, 2].add_(1)
    y.swapaxes(0, 1)[1].mul_(2)
    y.swapdims(1, 2)[:, 3] = 0.5
    return y


def flat(x: Tensor) -> Tensor:
    y = x + 0
    y.view(-1, 8)[1:].mul_(2)
    y.view(y.shape[0], -1)[:, 8:].add_(1)
    y.flatten(1)[:, ::2].mul_(0.5)
    return y


def raveled(x: Tensor) -> Tensor:
    y = x + 0
    before = y.ravel()
    y.ravel().add_(x.reshape(-1))
    y[:1].reshape(-1).mul_(2)
    y.mT.ravel().mul_(5)  # a copy, which nobody reads
    torch.atleast_3d(y).add_(before.sum())
    y.mH[:, 1].add_(1)
    return y


def expanded(x: Tensor) -> Tensor:
    y = x + 0
    y.expand(1, *y.shape)[0, :, 1:] *= 2
    y.broadcast_to(1, *y.shape)[0, :, 2] *= 3
    return y


def squeezed(x: Tensor) -> Tensor:
    y = x.unsqueeze(1) + 0
    y.squeeze(1)[:, 1] *= 2
    y.squeeze(1).unsqueeze(-1).add_(1)
    return y.squeeze(1)


def narrowed(x: Tensor) -> Tensor:
    y = x + 0
    y.narrow(1, 1, 2).mul_(2)
    y[..., -3:].add_(1)
    y[:, ::2, 1].fill_(3)
    return y


def on_the_diagonal(x: Tensor) -> Tensor:
    y = x @ x.mT
    y.diagonal(0, 1, 2).mul_(2)
    return y @ x


def views_of_views(x: Tensor) -> Tensor:
    """As in mamba: a part of a turned and reshaped projection."""
    y = x + 0
    z = y.view(y.shape[0], y.shape[1], 2, 4).permute(2, 0, 3, 1)
    z[0].transpose(1, 2)[:, 1:].mul_(2)
    return y + z[1].mean()


def pieces(x: Tensor) -> Tensor:
    y = x + 0
    with torch.no_grad():
        y.detach().unbind(-1)[1].mul_(2)
        y.detach().split(3, -1)[1].mul_(2)
        y.detach().split([2, 6], -1)[1].add_(1)
        y.detach().chunk(4, -1)[2].zero_()
    return y


def stale_views(x: Tensor) -> Tensor:
    """Views that were taken before a write and are read after it; one is written twice."""
    y = x + 0
    a, b = y[..., :3], y.mT[:, 3:]
    c = a[:, 1:]
    y.mul_(2)
    b.add_(1)
    b.mul_(3)
    c[:, 0] = 1
    return torch.cat([b.mT, a], -1) + y.sum(1, keepdim=True)


def as_real(x: Tensor) -> Tensor:
    y = torch.view_as_complex(x.reshape(*x.shape[:-1], 4, 2) + 0)
    torch.view_as_real(y)[..., 0].mul_(2)
    y[..., 1:3] = y[..., :2] * 1j
    y.imag.add_(1)
    return torch.view_as_real(y).flatten(-2)


def assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[:, 0] = x.mean(1)
    y[..., 2:4] = 1
    y[:, :, 5:] = x[:, :1, 5:]
    y[0] = x[0].float()
    return y


def through_masks(x: Tensor) -> Tensor:
    y = x + 0
    y[:, [0, 2]] = y[:, [2, 0]] * 2
    y[y > 1] = 0.25
    return y


def scalar_power(x: Tensor) -> Tensor:
    y = x.abs() + 1
    y.pow_(-0.5)
    return y.mul_(x).clamp_(-1, 1)


def into_out(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros(x.shape, dtype=x.dtype)
        torch.mul(x.detach(), 2, out=y)
        y.mT[:, 0] += 1
    return x + y


def dropped(x: Tensor) -> Tensor:
    """Dropout that drops nothing returns its argument."""
    h = nn.functional.dropout(x, 0.1, False)
    h += 1
    return h + x


def reshaped_in_place(x: Tensor) -> Tensor:
    y = x + 0
    y.unsqueeze_(1)
    y[:, 0, 1] = 2
    y.squeeze_(1)
    y.transpose_(1, 2)
    y[:, 0].mul_(2)
    return y.transpose(1, 2)


def unseen(x: Tensor) -> Tensor:
    """What no_grad and .data write, autograd does not see: the gradient is that of x + 0."""
    y = x + 0
    y.data[:, 0] = 3
    with torch.no_grad():
        y.mul_(2)
        y[..., 1] = 0
        z = y * 3
    return y + z


def redrawn(x: Tensor) -> Tensor:
    y = x + 0
    y[:, 0].normal_().mul_(0)
    y[:, 1].uniform_().mul_(0)
    return y


def shared_constant(x: Tensor) -> Tensor:
    """What a number becomes is detached in place as torch makes it, and shared from then on."""
    number, _ = torch.broadcast_tensors(torch.tensor(0.5, dtype=x.dtype), x)
    return x * number


BODIES = (moved, unflattened, turned, flat, raveled, expanded, squeezed, narrowed, on_the_diagonal,
          pieces, views_of_views, stale_views, as_real, assigned, through_masks, scalar_power,
          into_out, dropped, reshaped_in_place, redrawn, unseen, shared_constant)  # fmt: skip
each_body = pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
either_way = pytest.mark.parametrize("record", [False, True], ids=["exported", "recorded"])


def example(batch: int = 2, length: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 3, generator=draw, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    found = torch.autograd.grad(model(x).square().sum(), [*model.parameters(), x])
    return list(found)


@each_body
@either_way
@pytest.mark.filterwarnings("ignore:the forward branches on the values")
def test_values_and_gradients_are_the_models(body: Body, record: bool) -> None:
    model, x = Around(body, record=record).eval(), example()
    doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting="sliced")
    torch.testing.assert_close(doll(x), model(x), rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(doll, x), gradients(model, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert mk.verify(doll, (x,)).passed


@each_body
def test_no_view_keeps_the_sizes_of_the_example(body: Body) -> None:
    model = Around(body).eval()
    doll = mk.convert(model, (example(),), sizes=[0.5, 1.0], nesting="sliced")
    for shape in ((3, 4), (2, 7), (1, 4), (5, 5)):
        torch.testing.assert_close(doll(example(*shape)), model(example(*shape)))


@each_body
@either_way
def test_nothing_writes_any_more(body: Body, record: bool) -> None:
    for node in trace(Around(body, record=record).eval(), (example(),)).graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            assert not node.target._schema.is_mutable, node


def test_an_alias_that_is_not_understood_is_refused() -> None:
    def body(x: Tensor) -> Tensor:
        y = x + 0
        y.as_strided((2, 8), (32, 1)).mul_(2)
        return y

    with pytest.raises(TraceError, match="as_strided gives memory") as caught:
        mk.convert(Around(body).eval(), (example(),), sizes=[0.5, 1.0])
    assert "test_mutations.py:" in str(caught.value)


def windows(y: Tensor) -> Tensor:
    """[N, L, 8] -> [N, L - 1, 8], sums of neighbours that share memory."""
    n, length, width = y.shape
    return y.as_strided((n, length - 1, 2, width), (length * width, width, width, 1)).sum(2)


def test_windows_taken_after_a_write_see_it() -> None:
    def body(x: Tensor) -> Tensor:
        y = x + 0
        y /= 2.0
        scale = torch.tensor(3.0).detach_()
        return windows(y) * scale

    model = Around(body).eval()
    doll = mk.convert(model, (example(),), sizes=[0.5, 1.0], nesting="sliced")
    torch.testing.assert_close(doll(example(3)), model(example(3)), rtol=1e-12, atol=1e-12)
    for found, expected in zip(
        gradients(doll, example()), gradients(model, example()), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_windows_taken_before_a_write_are_refused() -> None:
    def body(x: Tensor) -> Tensor:
        y = x + 0
        strided = y.as_strided((2, 3, 2, 8), (32, 8, 8, 1))
        y.mul_(2)
        return strided.sum(2)

    with pytest.raises(TraceError, match="as_strided shares that memory"):
        mk.convert(Around(body).eval(), (example(),), sizes=[0.5, 1.0])


def test_a_write_into_the_models_own_is_said() -> None:
    class Counting(Around):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__(torch.tanh)
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    model = Counting().eval()
    plan = mk.inspect(model, (example(),))
    assert any("writes into its own 'calls'" in r and "test_mutations" in r for r in plan.remarks)
    assert model.calls == 0


@pytest.mark.parametrize("how", ["resize_as_", "resize_"])
def test_a_tensor_that_gets_another_size_in_place_is_refused(how: str) -> None:
    class Resizing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made = torch.zeros(1)
            made.resize_as_(x) if how == "resize_as_" else made.resize_(x.shape)
            return made.copy_(x)

    with pytest.raises(TraceError, match=rf"{how} at .*another size in place.*zeros_like"):
        trace(Resizing(), (torch.ones(3, 4),))


class Renormed(nn.Module):
    """A tied table whose rows are scaled down to a largest norm as they are looked up."""

    def __init__(self, width: int = 8, order: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, width, max_norm=1.0, norm_type=order)
        self.inner = nn.Linear(width, width)
        with torch.no_grad():
            self.table.weight.mul_(torch.arange(9)[:, None] / 2)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> [N, T, 9]"""
        return torch.relu(self.inner(self.table(ids))) @ self.table.weight.T


@pytest.mark.parametrize("order", [1.0, 2.0])
@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_a_table_of_a_largest_norm_nests_and_is_saved(
    nesting: str, order: float, tmp_path: Path
) -> None:
    model, ids = Renormed(order=order).eval(), torch.tensor([[1, 5, 5], [8, 0, 2]])
    before = model.table.weight.detach().clone()
    doll = mk.convert(model, (ids,), sizes=[4, 8], nesting=nesting)
    assert torch.equal(model.table.weight, before) and mk.verify(doll, (ids,)).passed
    mk.save(doll, tmp_path / "c")
    for given in (ids, ids[:1], torch.tensor([[3, 8]])):
        small = mk.load(tmp_path / "c", size=4)(given)
        torch.testing.assert_close(small, doll.outputs(given)[4])
        if nesting == "sliced":
            native = Renormed(4, order).eval()
            native.load_state_dict(mk.slice(doll, 4).state_dict())
            torch.testing.assert_close(native(given), small)  # and writes into itself
    with pytest.raises(TraceError, match="writes into 'table.weight'"):
        doll.train()
    if nesting == "sliced":
        torch.testing.assert_close(doll(ids), model(ids))


class Ranking(nn.Module):
    """Leaves items out by -inf, under no_grad, as evaluation is often written."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.items = nn.Linear(6, width).double(), nn.Embedding(20, width).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, 6] -> the best items [N, 5] and their scores"""
        with torch.no_grad():
            scores = torch.einsum("bd,nd->bn", self.inner(x), self.items.weight)
            scores[:, 0] = float("-inf")
            scores[:, 15:] = float("-inf")
            found = torch.topk(scores, 5, dim=1)
            return found.indices, found.values


def test_what_is_left_out_by_infinity_under_no_grad_stays_out() -> None:
    model, x = Ranking().eval(), torch.randn(4, 6, dtype=torch.float64)
    doll = mk.convert(model, (x,), sizes=[8, 16], nesting="sliced").eval()
    part, small = mk.slice(doll, 8), Ranking(8).eval()
    small.load_state_dict(part.state_dict())
    for ours, theirs in ((doll, model), (part, small)):
        items, values = ours(x)
        torch.testing.assert_close(values, theirs(x)[1], rtol=1e-12, atol=0)
        assert torch.equal(items, theirs(x)[0])
