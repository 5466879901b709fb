"""The steps of random models: each turns a value [N, L, C] or [N, C, H, W] into another.

Sizes come from the shapes at hand, or are constants of the model (a head dim, channels per group);
a step whose meaning at a smaller width the model's text leaves open says so with `native = False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.fuzz.building import Builder, Value

aten = torch.ops.aten
Step = Callable[[Builder, Value, list[Value]], Any]

SEQUENCE: dict[str, Step] = {}
IMAGE: dict[str, Step] = {}
LARGEST = 48


def step(table: dict[str, Step]) -> Callable[[Step], Step]:
    """Register a step under its function's name."""

    def register(function: Step) -> Step:
        table[function.__name__] = function
        return function

    return register


def linear(b: Builder, x: Value, out: int, *, bias: bool = True) -> Value:
    """x W' + c with new parameters of `out` rows."""
    weight = b.param(out, x.width, scale=x.width**-0.5)
    return b(aten.linear.default, x, weight, b.param(out) if bias else None)


def peers(x: Value, pool: list[Value], *, last: bool = True) -> list[Value]:
    """Return the values of x's shape (with `last`), or of its leading dims."""
    same = [v for v in pool if len(v.shape) == len(x.shape) and v.shape[:-1] == x.shape[:-1]]
    return [v for v in same if v.shape == x.shape] if last else same


def partner(b: Builder, x: Value, pool: list[Value], *, last: bool = True) -> Value:
    """Return another value like x, chosen once: a replay takes the same position of the pool."""
    if b.run.state is None:
        options = [i for i, v in enumerate(pool) if any(v is p for p in peers(x, pool, last=last))]
        return pool[b.choose(options or [len(pool) - 1])]
    return pool[b.choose(())]


# --- sequences [N, L, C] ----------------------------------------------------------------------


@step(SEQUENCE)
def dense(b: Builder, x: Value, pool: list[Value]) -> Value:
    return linear(b, x, b.width(), bias=b.chance(50))


@step(SEQUENCE)
def back(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A linear to the width of an earlier value, then a residual."""
    other = partner(b, x, pool, last=False)
    return b(aten.add.Tensor, other, linear(b, x, other.width))


@step(SEQUENCE)
def product(b: Builder, x: Value, pool: list[Value]) -> Value:
    weight = b.param(x.width, b.width())
    return b(aten.matmul.default, x, weight)


@step(SEQUENCE)
def contracted(b: Builder, x: Value, pool: list[Value]) -> Value:
    weight = b.param(x.width, b.width())
    return b(aten.einsum.default, "nlc,cd->nld", [x, weight])


@step(SEQUENCE)
def activation(b: Builder, x: Value, pool: list[Value]) -> Value:
    names = (
        "tanh",
        "relu",
        "gelu",
        "silu",
        "sigmoid",
        "sin",
        "cos",
        "elu",
        "softplus",
        "leaky_relu",
    )
    return b(getattr(aten, b.choose(names)).default, x)


@step(SEQUENCE)
def residual(b: Builder, x: Value, pool: list[Value]) -> Value:
    op = b.choose(("add", "mul", "sub", "maximum"))
    target = aten.maximum.default if op == "maximum" else getattr(aten, op).Tensor
    return b(target, x, partner(b, x, pool))


@step(SEQUENCE)
def layer_norm(b: Builder, x: Value, pool: list[Value]) -> Value:
    affine = (b.param(x.width), b.param(x.width)) if b.chance(70) else (None, None)
    return b(aten.layer_norm.default, x, [x.width], *affine)


@step(SEQUENCE)
def rms_norm(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(aten.rms_norm.default, x, [x.width], b.param(x.width), 1e-5)


@step(SEQUENCE)
def hand_rms(b: Builder, x: Value, pool: list[Value]) -> Value:
    """x / sqrt(mean(x^2) + 1), as many language models write it."""
    mean = b(aten.mean.dim, b(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    return b(aten.mul.Tensor, x, b(aten.rsqrt.default, b(aten.add.Tensor, mean, 1.0)))


@step(SEQUENCE)
def statistic(b: Builder, x: Value, pool: list[Value]) -> Value:
    """x less (or times) a statistic of its units."""
    calls = {
        "mean": (aten.mean.dim, [-1], True), "sum": (aten.sum.dim_IntList, [-1], True),
        "amax": (aten.amax.default, [-1], True),
        "norm": (aten.linalg_vector_norm.default, 2, [-1], True),
        "logsumexp": (aten.logsumexp.default, [-1], True), "amin": (aten.amin.default, [-1], True),
    }  # fmt: skip
    target, *args = calls[b.choose(tuple(calls))]
    op = b.choose((aten.sub.Tensor, aten.mul.Tensor, aten.add.Tensor))
    return b(op, x, b(target, x, *args))


@step(SEQUENCE)
def variance(b: Builder, x: Value, pool: list[Value]) -> Value:
    if b.decide(x.width < 2):
        return x
    var = b(aten.var.correction, x, [-1], correction=0, keepdim=True)
    return b(aten.mul.Tensor, x, b(aten.rsqrt.default, b(aten.add.Tensor, var, 1.0)))


@step(SEQUENCE)
def pooled(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A statistic over the length, back at every position."""
    target, *args = b.choose(((aten.mean.dim, [1], True), (aten.amax.default, [1], True)))
    return b(aten.add.Tensor, x, b(target, x, *args))


@step(SEQUENCE)
def softmax(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(b.choose((aten.softmax.int, aten.log_softmax.int)), x, b.choose((-1, -1, 1)))


@step(SEQUENCE)
def gated(b: Builder, x: Value, pool: list[Value]) -> Value:
    """gate | up in one linear, then chunk, as SwiGLU writes it."""
    hidden = b.width()
    wide = linear(b, x, 2 * hidden)
    if b.chance(30):
        return b(aten.glu.default, wide, -1)
    gate, up = b(aten.chunk.default, wide, 2, -1)
    return linear(b, b(aten.mul.Tensor, b(aten.silu.default, gate), up), b.width())


@step(SEQUENCE)
def gated_by_two(b: Builder, x: Value, pool: list[Value]) -> Value:
    hidden = b.width()
    gate, up = linear(b, x, hidden, bias=False), linear(b, x, hidden, bias=False)
    hidden_units = b(aten.mul.Tensor, b(aten.gelu.default, gate), up)
    return b(aten.add.Tensor, x, linear(b, hidden_units, x.width))


def heads(b: Builder, x: Value, dim: int, count: int) -> Value:
    """[N, L, H d] -> [N, H, L, d]; a single head is as wide as it comes."""
    n, length, _ = x.shape
    split = b(aten.reshape.default, x, [n, length, -1, dim if count > 1 else x.width])
    return b(aten.transpose.int, split, 1, 2)


def merged(b: Builder, x: Value) -> Value:
    """[N, H, L, d] -> [N, L, H d]"""
    n, h, length, dim = x.shape
    turned = b(aten.transpose.int, x, 1, 2)
    return b(aten.reshape.default, turned, [n, length, h * dim])


def attend(b: Builder, q: Value, k: Value, v: Value) -> Value:
    """softmax(q k') v, by the fused op or by hand."""
    if b.chance(50):
        return b(aten.scaled_dot_product_attention.default, q, k, v)
    scores = b(aten.matmul.default, q, b(aten.transpose.int, k, -2, -1))
    scores = b(aten.mul.Tensor, scores, 0.37)
    return b(aten.matmul.default, b(aten.softmax.int, scores, -1), v)


@step(SEQUENCE)
def attention(b: Builder, x: Value, pool: list[Value]) -> Value:
    dim, count = b.choose((1, 2, 3, 4)), b.choose((1, 2, 3, 4))
    q, k, v = (heads(b, linear(b, x, count * dim), dim, count) for _ in range(3))
    return b(aten.add.Tensor, x, linear(b, merged(b, attend(b, q, k, v)), x.width))


@step(SEQUENCE)
def fused_attention(b: Builder, x: Value, pool: list[Value]) -> Value:
    """q, k, v in one linear: by chunk, by a view, or by a view whose heads come first."""
    dim, count, how = b.choose((2, 3)), b.choose((2, 3, 4)), b.choose((0, 1, 2))
    packed = linear(b, x, 3 * count * dim)
    n, length, _ = x.shape
    if how == 0:
        q, k, v = (heads(b, part, dim, count) for part in b(aten.chunk.default, packed, 3, -1))
    elif how == 1:
        five = b(aten.reshape.default, packed, [n, length, 3, -1, dim])
        q, k, v = b(aten.unbind.int, b(aten.permute.default, five, [2, 0, 3, 1, 4]), 0)
    else:
        by_head = b(aten.reshape.default, packed, [n, length, -1, 3 * dim])
        turned = b(aten.transpose.int, by_head, 1, 2)
        q, k, v = b(aten.split_with_sizes.default, turned, [dim] * 3, -1)
    return b(aten.add.Tensor, x, linear(b, merged(b, attend(b, q, k, v)), x.width))


@step(SEQUENCE)
def grouped_attention(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Several query heads share one key and value head."""
    dim, count, share = b.choose((2, 3)), b.choose((2, 3, 4)), b.choose((2, 3))
    q = heads(b, linear(b, x, count * share * dim), dim, count)
    k, v = (heads(b, linear(b, x, count * dim), dim, count) for _ in range(2))
    if b.chance(50):
        out = b(aten.scaled_dot_product_attention.default, q, k, v, enable_gqa=True)
    else:
        out = attend(b, q, *(_shared(b, t, share) for t in (k, v)))
    return linear(b, merged(b, out), b.width())


def _shared(b: Builder, x: Value, share: int) -> Value:
    if b.chance(50):
        return b(aten.repeat_interleave.self_int, x, share, 1)
    n, h, length, dim = x.shape
    wide = b(aten.expand.default, b(aten.unsqueeze.default, x, 2), [n, h, share, length, dim])
    return b(aten.reshape.default, wide, [n, h * share, length, dim])


@step(SEQUENCE)
def concatenated(b: Builder, x: Value, pool: list[Value]) -> Value:
    other = partner(b, x, pool, last=False)
    b.run.copied = True
    wide = b.decide(x.width + other.width > LARGEST)
    return x if wide else b(aten.cat.default, [x, other], -1)


@step(SEQUENCE)
def halves(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Rotate halves, as rotary embeddings do."""
    b.run.copied = True
    wide = linear(b, x, 2 * b.width())
    first, second = b(aten.chunk.default, wide, 2, -1)
    turned = b(aten.cat.default, [b(aten.neg.default, second), first], -1)
    return b(aten.add.Tensor, wide, turned)


@step(SEQUENCE)
def uneven(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Two pieces of unequal widths, one changed, laid together again."""
    b.run.native = False
    at = b.choose(range(x.width))
    if at == 0:
        return x
    first, second = b(aten.split_with_sizes.default, x, [at, x.width - at], -1)
    parts = [b(aten.tanh.default, first), second]
    return b(aten.cat.default, parts[:: b.choose((1, -1))], -1)


@step(SEQUENCE)
def sliced(b: Builder, x: Value, pool: list[Value]) -> Value:
    b.run.native = False
    start = b.choose(range(x.width))
    stop = b.choose(range(start + 1, x.width + 1))
    return b(aten.slice.Tensor, x, -1, start, stop, b.choose((1, 1, 1, 2)))


@step(SEQUENCE)
def stacked(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Two values one beside the other, merged in either order, or summed."""
    pair, n, length = [x, partner(b, x, pool)], *x.shape[:2]
    b.run.copied = True
    dim = b.choose((2, 3))
    both = b(aten.stack.default, pair, dim)
    if b.decide(2 * x.width > LARGEST) or b.chance(40):
        return b(aten.sum.dim_IntList, both, [dim])
    return b(aten.reshape.default, both, [n, length, 2 * x.width])


@step(SEQUENCE)
def reordered(b: Builder, x: Value, pool: list[Value]) -> Value:
    """[C] -> [h, d] -> [d, h] -> [C]: the units change places."""
    dim, n, length = b.divisor(x.width), *x.shape[:2]
    # In [d, h] the number d' of a second split may count units of either: the model's text is open.
    b.run.native &= not b.run.reordered
    b.run.reordered = True
    split = b(aten.reshape.default, x, [n, length, -1, dim])
    return b(aten.reshape.default, b(aten.transpose.int, split, 2, 3), [n, length, x.width])


@step(SEQUENCE)
def repeated(b: Builder, x: Value, pool: list[Value]) -> Value:
    b.run.copied, times = True, b.choose((2, 3))
    b.run.native &= not b.decide(x.width == 1)  # one unit repeated is a broadcast, of any width
    if b.decide(x.width * times > LARGEST):
        return x
    if b.chance(50):
        return b(aten.repeat.default, x, [1, 1, times])
    return b(aten.repeat_interleave.self_int, x, times, 2)


@step(SEQUENCE)
def shifted(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A parameter of the width, added or multiplied, of one to three dims."""
    ones = b.choose((0, 1, 2))
    op = b.choose((aten.add.Tensor, aten.mul.Tensor))
    return b(op, x, b.param(*(1,) * ones, x.width))


@step(SEQUENCE)
def positions(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(aten.add.Tensor, x, b.param(x.shape[1], x.width))


@step(SEQUENCE)
def ramp(b: Builder, x: Value, pool: list[Value]) -> Value:
    """0, 1, 2, ... along the width."""
    b.run.constant = True
    line = b(aten.arange.default, x.width, dtype=torch.float64)
    return b(aten.add.Tensor, x, b(aten.mul.Tensor, line, 0.01))


@step(SEQUENCE)
def filled(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A constant made at the width, laid beside x along the length."""
    made = b(aten.full.default, [x.shape[0], 1, x.width], 0.5, dtype=torch.float64)
    both = b(aten.cat.default, [made, x], 1)
    return b(aten.slice.Tensor, both, 1, 0, x.shape[1])


@step(SEQUENCE)
def token(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A learned token in front, attended to, taken off again."""
    n, length, width = x.shape
    made = b(aten.expand.default, b.param(1, 1, width), [n, -1, -1])
    both = b(aten.cat.default, [made, x], 1)
    mixed = b(aten.add.Tensor, both, b(aten.mean.dim, both, [1], True))
    return b(aten.slice.Tensor, mixed, 1, 1, length + 1)


@step(SEQUENCE)
def picked(b: Builder, x: Value, pool: list[Value]) -> Value:
    """One position, back at every position."""
    one = b(aten.select.int, x, 1, b.choose((0, -1)))
    return b(aten.add.Tensor, x, b(aten.unsqueeze.default, one, 1))


@step(SEQUENCE)
def held(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Ops that see the number of a unit: they hold the axis."""
    calls = {
        "flip": (aten.flip.default, [-1]), "roll": (aten.roll.default, [1], [-1]),
        "cumsum": (aten.cumsum.default, -1), "topk": (aten.topk.default, 1, -1),
        "sort": (aten.sort.default, -1), "triu": (aten.triu.default,),
        "select": (aten.select.int, -1, 0),
    }  # fmt: skip
    name = b.choose(tuple(calls))
    target, *args = calls[name]
    out = b(target, x, *args)
    out = out[0] if isinstance(out, tuple) else out
    return b(aten.unsqueeze.default, out, -1) if name == "select" else out


@step(SEQUENCE)
def indexed(b: Builder, x: Value, pool: list[Value]) -> Value:
    order = b.choose((tuple(b.run.random.sample(range(x.width), x.width)),) if _first(b) else ())
    index = b.indices(order)
    b.run.native &= order != tuple(range(len(order)))
    if b.chance(50):
        return b(aten.index_select.default, x, 2, index)
    return b(aten.index.Tensor, x, [None, None, index])


def _first(b: Builder) -> bool:
    return b.run.state is None


@step(SEQUENCE)
def gathered(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Positions by index."""
    n, length, width = x.shape
    index = b.indices([b.choose(range(length)) for _ in range(length)])
    wide = b(aten.reshape.default, index, [1, length, 1])
    wide = b(aten.expand.default, wide, [n, length, width])
    return b(aten.gather.default, x, 1, wide)


@step(SEQUENCE)
def scores(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Every position against every other, and back: one head without weights."""
    other = partner(b, x, pool)
    weights = b(aten.softmax.int, b(aten.matmul.default, x, b(aten.transpose.int, other, 1, 2)), -1)
    return b(aten.matmul.default, weights, x)


@step(SEQUENCE)
def tied(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A hidden layer whose way back is its way there, turned."""
    weight = b.param(b.width(), x.width, scale=0.3)
    hidden = b(aten.tanh.default, b(aten.linear.default, x, weight))
    return b(aten.matmul.default, hidden, b.again(weight))


@step(SEQUENCE)
def convolved(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A convolution over the length: dense, grouped, or one filter for each unit."""
    turned = b(aten.transpose.int, x, 1, 2)
    out = conv(b, turned, aten.conv1d.default, (3,))
    if b.chance(30):
        out = batch_norm(b, out, [])
    return b(aten.transpose.int, out, 1, 2)


@step(SEQUENCE)
def mixer(b: Builder, x: Value, pool: list[Value]) -> Value:
    """A linear over the length."""
    turned = b(aten.transpose.int, x, 1, 2)
    hidden = b(aten.relu.default, linear(b, turned, b.choose((4, 6))))
    return b(aten.transpose.int, linear(b, hidden, x.shape[1]), 1, 2)


@step(SEQUENCE)
def padded(b: Builder, x: Value, pool: list[Value]) -> Value:
    before, after = b.choose((0, 1, 2)), b.choose((0, 1, 3))
    return b(aten.pad.default, x, [before, after])


@step(SEQUENCE)
def masked(b: Builder, x: Value, pool: list[Value]) -> Value:
    positive = b(aten.gt.Scalar, partner(b, x, pool), 0.0)
    return b(aten.where.self, positive, x, b(aten.zeros_like.default, x))


@step(SEQUENCE)
def experts(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Several matrices in one parameter, weighted by a router."""
    count, out = b.choose((2, 3)), b.width()
    weight = b.param(count, x.width, out, scale=0.3)
    router = b(aten.softmax.int, linear(b, x, count), -1)
    each = b(aten.einsum.default, "nlc,ecd->nled", [x, weight])
    return b(aten.einsum.default, "nled,nle->nld", [each, router])


# --- images [N, C, H, W] ----------------------------------------------------------------------


def conv(b: Builder, x: Value, target: Any, kernel: tuple[int, ...]) -> Value:
    """A convolution that keeps the space; channels per group are a constant of the model."""
    channels = x.shape[1]
    how = b.choose(("dense", "dense", "depthwise", "grouped"))
    per_group = {"dense": channels, "depthwise": 1}.get(how) or b.divisor(channels)
    groups = 1 if how == "dense" else channels // per_group
    out = b.width() if how == "dense" else groups * b.choose((1, 1, 2))
    weight = b.param(out, per_group, *kernel, scale=(per_group * 3) ** -0.5)
    if how != "dense":
        groups = channels // weight.shape[1]
    bias = b.param(out) if b.chance(50) else None
    pads = [k // 2 for k in kernel]
    ones = [1] * len(kernel)
    return b(target, x, weight, bias, ones, pads, ones, groups)


@step(IMAGE)
def conv2d(b: Builder, x: Value, pool: list[Value]) -> Value:
    size = b.choose((1, 3))
    return conv(b, x, aten.conv2d.default, (size, size))


@step(IMAGE)
def conv_transpose(b: Builder, x: Value, pool: list[Value]) -> Value:
    weight = b.param(x.shape[1], b.width(), 1, 1, scale=0.5)
    return b(aten.conv_transpose2d.input, x, weight)


@step(IMAGE)
def batch_norm(b: Builder, x: Value, pool: list[Value]) -> Value:
    c = x.shape[1]
    made = (b.param(c), b.param(c), b.buffer(c), b.buffer(c))
    return b(aten.batch_norm.default, x, *made, False, 0.1, 1e-5, False)


@step(IMAGE)
def group_norm(b: Builder, x: Value, pool: list[Value]) -> Value:
    per_group = b.divisor(x.shape[1])
    affine = (b.param(x.shape[1]), b.param(x.shape[1]))
    return b(aten.group_norm.default, x, x.shape[1] // per_group, *affine)


@step(IMAGE)
def one_group(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(aten.group_norm.default, x, 1, b.param(x.shape[1]), b.param(x.shape[1]))


@step(IMAGE)
def unit(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(getattr(aten, b.choose(("relu", "silu", "hardswish", "tanh"))).default, x)


@step(IMAGE)
def prelu(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(aten.prelu.default, x, b.param(x.shape[1] if b.chance(70) else 1))


@step(IMAGE)
def skip(b: Builder, x: Value, pool: list[Value]) -> Value:
    return b(aten.add.Tensor, x, partner(b, x, pool))


@step(IMAGE)
def dense_net(b: Builder, x: Value, pool: list[Value]) -> Value:
    grown = conv(b, x, aten.conv2d.default, (1, 1))
    both, b.run.copied = x.shape[1] + grown.shape[1], True
    return grown if b.decide(both > LARGEST) else b(aten.cat.default, [x, grown], 1)


@step(IMAGE)
def squeeze_excite(b: Builder, x: Value, pool: list[Value]) -> Value:
    c = x.shape[1]
    mean = b(aten.mean.dim, x, [2, 3], True)
    inner = b.param(b.width(), c, 1, 1)
    outer = b.param(c, inner.shape[0], 1, 1)
    gate = b(aten.conv2d.default, b(aten.relu.default, b(aten.conv2d.default, mean, inner)), outer)
    return b(aten.mul.Tensor, x, b(aten.sigmoid.default, gate))


@step(IMAGE)
def pooling(b: Builder, x: Value, pool: list[Value]) -> Value:
    if b.chance(50):
        return b(aten.max_pool2d.default, x, [3, 3], [1, 1], [1, 1])
    return b(aten.avg_pool2d.default, x, [3, 3], [1, 1], [1, 1])


@step(IMAGE)
def shuffled(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Channel shuffle by view and transpose; groups are a constant of the model."""
    n, c, h, w = x.shape
    groups = b.divisor(c)
    b.run.native = False
    split = b(aten.reshape.default, x, [n, groups, -1, h, w])
    return b(aten.reshape.default, b(aten.transpose.int, split, 1, 2), [n, c, h, w])


@step(IMAGE)
def channel_mean(b: Builder, x: Value, pool: list[Value]) -> Value:
    target, *args = b.choose(((aten.mean.dim, [1], True), (aten.amax.default, [1], True)))
    return b(aten.mul.Tensor, x, b(target, x, *args))


@step(IMAGE)
def pixels(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Four channels for each pixel of a larger picture, then down again."""
    c = b.width()
    weight = b.param(4 * c, x.shape[1], 1, 1)
    large = b(aten.pixel_shuffle.default, b(aten.conv2d.default, x, weight), 2)
    return b(aten.avg_pool2d.default, large, [2, 2])


@step(IMAGE)
def last_norm(b: Builder, x: Value, pool: list[Value]) -> Value:
    """Channels last for a layer norm, and back."""
    c = x.shape[1]
    last = b(aten.permute.default, x, [0, 2, 3, 1])
    normed = b(aten.layer_norm.default, last, [c], b.param(c), b.param(c))
    return b(aten.permute.default, normed, [0, 3, 1, 2])


def to_sequence(b: Builder, x: Value) -> Value:
    """[N, C, H, W] -> [N, H W, C]"""
    flat = b(aten.flatten.using_ints, x, 2)
    return b(aten.transpose.int, flat, 1, 2)


def area(x: Value) -> int:
    """Return the pixels of an image."""
    return math.prod(x.shape[2:])
