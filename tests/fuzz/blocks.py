"""Blocks of eager models, as people write them: each turns [B, L, D] into [B, L, D] at any width.

What they have in common is that a naive tracer loses something of them: a write through a view, a
detach, a branch on the mode or on the length, a value made of parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.zoo.registry import Scale

WIDTH = 16
Make = Callable[[Scale], nn.Module]
BLOCKS: dict[str, Make] = {}
KINDS: dict[str, list[str]] = {}


def block(kind: str) -> Callable[[Make], Make]:
    """Register a block of a kind under its class's or function's name."""

    def register(make: Make) -> Make:
        BLOCKS[make.__name__] = make
        KINDS.setdefault(kind, []).append(make.__name__)
        return make

    return register


class Residual(nn.Module):
    """x + f(linear(x)), where f is a function of the values and of a second linear's."""

    def __init__(self, s: Scale, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self.first(x), self.second(x))


def residual(kind: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Register a residual block of a function of two values."""
    BLOCKS[function.__name__] = lambda s: Residual(s, function)
    KINDS.setdefault(kind, []).append(function.__name__)


# --- plain ---------------------------------------------------------------------------------------


@block("plain")
class FeedForward(nn.Module):
    """Norm, up, GELU, down."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(s(WIDTH))
        self.up, self.down = nn.Linear(s(WIDTH), s(40)), nn.Linear(s(40), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@block("plain")
class Attention(nn.Module):
    """Heads of a fixed dim by hand, causal."""

    def __init__(self, s: Scale, heads: int = 4) -> None:
        super().__init__()
        self.heads = s(heads) if heads > 1 else 1
        self.q, self.k, self.v, self.o = (nn.Linear(s(WIDTH), s(WIDTH)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).reshape(batch, length, width))


@block("single head")
def one_head(s: Scale) -> nn.Module:
    return Attention(s, 1)


@block("single head")
class OneHeadModule(nn.Module):
    """nn.MultiheadAttention with one head."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(s(WIDTH), 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@block("single head")
class NoWeights(nn.Module):
    """softmax(x x') x: every position against every other."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.value = nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.bmm((torch.bmm(x, x.mT) * 0.1).softmax(-1), self.value(x))


@block("plain")
class Recurrent(nn.Module):
    """A GRU over the positions."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.rnn = nn.GRU(s(WIDTH), s(WIDTH), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rnn(x)[0]


@block("plain")
class HandNorm(nn.Module):
    """(x - mean) / (std + eps), the unbiased deviation of BERT4Rec."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(s(WIDTH))), nn.Parameter(torch.zeros(s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a * (x - mean) / (std + 1e-6) + self.b


# --- writes in place, through views --------------------------------------------------------------


def write_movedim(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.movedim(1, 0)[0].mul_(0.5)
    return out * y


def write_unflatten(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.unflatten(-1, (-1, 2))[..., 0].add_(1.0)
    return out * y


def write_transposed(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.mT.mul_(y.mT)
    return out


def write_swapaxes(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.swapaxes(0, 1)[1] = y.swapaxes(0, 1)[0]
    return out


def write_diagonal(x: Tensor, y: Tensor) -> Tensor:
    square = torch.bmm(x, y.mT)
    square.diagonal(dim1=1, dim2=2).zero_()
    return torch.bmm(square, y) * 0.1


def write_rows_one_by_one(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    for i in range(out.shape[1]):
        out[:, i].mul_(0.5 + i % 2)
    return out + y


def write_expanded(x: Tensor, y: Tensor) -> Tensor:
    out = x.mean(1, keepdim=True).clone()
    wide = out.expand_as(x)
    out += 1.0
    return wide * y


def write_half_of_units(x: Tensor, y: Tensor) -> Tensor:
    out, half = x.clone(), x.shape[-1] // 2
    out[..., :half].add_(y[..., half:])
    return out


def write_narrow(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.narrow(1, 1, 2).copy_(y.narrow(1, 0, 2))
    return out + x


def write_select(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.select(1, 0).add_(y[:, -1])
    return out


def write_slice(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = y[:, :-1]
    return out + x


def write_rows(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    out[:, ::2] = x[:, ::2]
    out[:, 1::2] += y[:, 1::2]
    return out


def write_view_of_view(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.transpose(0, 1)[1:].transpose(0, 1)[..., None].squeeze(-1).mul_(y[:, 1:])
    return out


def write_masked(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out[y[..., :1].expand_as(y) > 0] = 0.25
    return out * y


def write_twice(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    part = out[:, :2]
    part += 1.0
    out *= 2.0
    return out + part.sum(1, keepdim=True) + y


def write_flat(x: Tensor, y: Tensor) -> Tensor:
    out = x.contiguous().clone()
    out.view(-1, x.shape[-1])[0] = y[0, 0]
    return out


def write_squeezed(x: Tensor, y: Tensor) -> Tensor:
    out = x.unsqueeze(1).clone()
    out.squeeze(1).tanh_()
    return out[:, 0] * y


def write_complex(x: Tensor, y: Tensor) -> Tensor:
    both = torch.complex(x, y)
    both.real.mul_(2.0)
    torch.view_as_real(both)[..., 1].add_(1.0)
    return both.abs()


def write_operand(x: Tensor, y: Tensor) -> Tensor:
    x += y
    x.mul_(0.5)
    return x.relu_()


def write_index_put(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out[:, torch.tensor([0, 2])] = y[:, torch.tensor([1, 3])]
    return out


def write_index_add(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.index_add_(1, torch.tensor([0, 0, 1]), y[:, :3])
    return out + x


for _function in (
    write_movedim, write_unflatten, write_transposed, write_swapaxes, write_diagonal,
    write_rows_one_by_one, write_expanded, write_half_of_units, write_narrow, write_select,
    write_slice, write_rows,
    write_view_of_view, write_masked, write_twice, write_flat, write_squeezed, write_complex,
    write_operand, write_index_put, write_index_add,
):  # fmt: skip
    residual("writes", _function)


# --- what gradients pass, and what they do not ---------------------------------------------------


class Reversal(torch.autograd.Function):
    """The identity whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -0.5 * grads[0]


class HardSign(torch.autograd.Function):
    """sign(x) with the gradient of a clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < 1)


def detached(x: Tensor, y: Tensor) -> Tensor:
    return x * y.detach()


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    return x + (x.round() - x).detach() + y


def stabilised(x: Tensor, y: Tensor) -> Tensor:
    return (x - x.amax(-1, keepdim=True).detach()).exp() * y


def without_grad(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(y)
    return x * gate


def reversed_(x: Tensor, y: Tensor) -> Tensor:
    return x + Reversal.apply(y)


def binarised(x: Tensor, y: Tensor) -> Tensor:
    return HardSign.apply(x) * y


def data_read(x: Tensor, y: Tensor) -> Tensor:
    return x * y.data


def hooked(x: Tensor, y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda g: 3 * g)
    return x + y


for _function in (
    detached, straight_through, stabilised, without_grad, reversed_, binarised, data_read, hooked,
):  # fmt: skip
    residual("gradients", _function)


# --- the mode ------------------------------------------------------------------------------------


@block("mode")
class BatchNorm(nn.Module):
    """Batch norm over the units."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(s(WIDTH), s(WIDTH)), nn.BatchNorm1d(s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)


@block("mode")
class FrozenBatchNorm(BatchNorm):
    """The same, held in evaluation mode by an override of train()."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self.norm.eval()
        return self


@block("mode")
class Branch(nn.Module):
    """Another path in training mode."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.first(x) if self.training else self.second(x))


@block("mode")
class Schedule(nn.Module):
    """A buffer that counts training steps and scales what passes."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.first = nn.Linear(s(WIDTH), s(WIDTH))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return x + self.first(x) * torch.exp(-0.1 * self.steps)


@block("mode")
class RunningMean(nn.Module):
    """A moving mean of the units, written in training mode through .data."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.first = nn.Linear(s(WIDTH), s(WIDTH))
        self.register_buffer("mean", torch.zeros(s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.mean.data.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return x - self.mean


# --- shapes --------------------------------------------------------------------------------------


def by_length(x: Tensor, y: Tensor) -> Tensor:
    return x / math.sqrt(x.shape[1]) + y


def first_five(x: Tensor, y: Tensor) -> Tensor:
    return x + y[:, :5].mean(1, keepdim=True)


def long_branch(x: Tensor, y: Tensor) -> Tensor:
    return x * y if x.shape[1] > 8 else x + y


def loop(x: Tensor, y: Tensor) -> Tensor:
    state, out = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        state = torch.tanh(state + x[:, i])
        out.append(state)
    return torch.stack(out, 1) * y


def batch_loop(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([a * b.mean(0) for a, b in zip(x, y, strict=True)])


def padded_windows(x: Tensor, y: Tensor) -> Tensor:
    length = x.shape[1]
    missing = -length % 4
    wide = F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, 4))
    return wide.mean(2, keepdim=True).expand_as(wide).flatten(1, 2)[:, :length] + y


def halves(x: Tensor, y: Tensor) -> Tensor:
    at = x.shape[1] // 2
    return torch.cat([x[:, at:], x[:, :at]], 1) * y


def row_numbers(x: Tensor, y: Tensor) -> Tensor:
    place = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    return x * torch.cos(place)[:, None] + y / float(x.shape[0])


def numpy_number(x: Tensor, y: Tensor) -> Tensor:
    return x * float(torch.tensor(x.shape[1]).log()) + y


for _function in (
    by_length, first_five, long_branch, loop, batch_loop, padded_windows, halves, row_numbers,
    numpy_number,
):  # fmt: skip
    residual("shapes", _function)


@block("shapes")
class Positions(nn.Module):
    """A table of positions cut to the length."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 16, s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.shape[1]]


@block("shapes")
class TopK(nn.Module):
    """The strongest positions by value."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(s(WIDTH), 1), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        at = self.score(x)[..., 0].topk(3, dim=1).indices
        kept = torch.gather(x, 1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return x + self.value(kept).mean(1, keepdim=True)


# --- parameters alone ----------------------------------------------------------------------------


@block("parameters")
class Cosine(nn.Module):
    """Cosine against a table, and the table's rows back."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        scores = F.normalize(x, dim=-1) @ F.normalize(self.table, dim=-1).T
        return x + scores.softmax(-1) @ self.table


@block("parameters")
class Mixture(nn.Module):
    """A softmax over a parameter of the width weighs the units."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logits.softmax(-1) * 8.0


@block("parameters")
class LowRank(nn.Module):
    """A weight that is a product of two, as in adapters."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.base = nn.Linear(s(WIDTH), s(WIDTH))
        self.a = nn.Parameter(torch.randn(3, s(WIDTH)))
        self.b = nn.Parameter(torch.randn(s(WIDTH), 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.base.weight + 0.1 * self.b @ self.a, self.base.bias)


@block("parameters")
class Query(nn.Module):
    """Learned queries, normed, that attend to the positions and are read back."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(3, s(WIDTH))), nn.LayerNorm(s(WIDTH))
        self.inner, self.value = nn.Linear(s(WIDTH), s(WIDTH)), nn.Linear(s(WIDTH), s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.inner(self.norm(self.queries))
        weights = (queries @ x.mT * 0.2).softmax(-1)
        return x + (self.value(x).mT @ weights.mT).mT.mean(1, keepdim=True)


@block("parameters")
class WeightNorm(nn.Module):
    """A weight-normalised linear."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(s(WIDTH), s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@block("parameters")
class SpectralNorm(nn.Module):
    """A linear divided by its largest singular value."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(s(WIDTH), s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@block("parameters")
class Features(nn.Module):
    """Frozen features of the world, projected, added to every position."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.register_buffer("features", torch.randn(7, 20, generator=draw))
        self.project = nn.Linear(20, s(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        table = self.project(self.features)
        return x + (x @ table.T * 0.1).softmax(-1) @ table


@block("parameters")
class Graph(nn.Module):
    """A graph of the rows of a table, propagated once; its rows are looked up."""

    def __init__(self, s: Scale) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.register_buffer("graph", torch.rand(16, 16, generator=draw))
        self.table = nn.Parameter(torch.randn(16, s(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        degree = self.graph.sum(1) ** -0.5
        table = (degree[:, None] * self.graph * degree) @ self.table
        return x + table[: x.shape[1]]


# --- names ---------------------------------------------------------------------------------------


def named(*names: str) -> Make:
    """Return a block whose layers have these names."""

    class Named(nn.Module):
        """Linears one after the other."""

        def __init__(self, s: Scale) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(s(WIDTH), s(WIDTH)))

        def forward(self, x: Tensor) -> Tensor:
            for name in names:
                x = torch.tanh(self._modules[name](x)) + x
            return x

    return Named


for _label, _names in {
    "names_of_graph_modules": ("graph", "code", "meta"),
    "names_escaped": ("user_meta", "user_graph", "graph"),
    "names_escaped_twice": ("user_user_meta", "user_meta", "meta"),
    "names_of_ours": ("plan", "sizes", "outputs", "_root"),
    "names_of_python": ("class", "def", "0", "1"),
    "names_of_nodes": ("x", "linear", "add", "output"),
}.items():
    BLOCKS[_label] = named(*_names)
    KINDS.setdefault("names", []).append(_label)
