"""The rule table, row by row: for every op key a small model that puts the op between two layers.

A case receives the builder, the op under test (the overload that takes the arguments) and x, which
a layer made: [2, 6, 8] for "sequence", [2, 8, 4, 4] for "image", [2, 8, 6] for "channels". What it
returns is read by further layers. `Holds` cases say that the op needs the axis whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.fuzz.building import Builder, Value

aten = torch.ops.aten
WIDTH = 8
Op = Callable[..., Any]
Body = Callable[[Builder, Op, Value], Any]


@dataclass(frozen=True)
class Case:
    """One model around an op; `holds`: the width stays whole; `noise`: random, not compared."""

    key: str
    body: Body
    start: str = "sequence"
    holds: bool = False
    noise: bool = False


CASES: list[Case] = []


def add(keys: str, body: Body, start: str = "sequence", **flags: bool) -> None:
    """Add a case for each key."""
    CASES.extend(Case(key, body, start, **flags) for key in keys.split())


def positive(b: Builder, x: Value) -> Value:
    """Return x brought into (0.25, 0.75)."""
    return b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.sigmoid.default, x), 0.5), 0.25)


def second(b: Builder, x: Value) -> Value:
    """Return another value of x's shape, with a parameter of the width."""
    shape = [1] * len(x.shape)
    dim = 1 if len(x.shape) > 3 else -1
    shape[dim] = x.shape[dim]
    return b(aten.mul.Tensor, b(aten.cos.default, x), b.param(*shape))


def truth(b: Builder, x: Value) -> Value:
    return b(aten.gt.Scalar, x, 0.0)


def integers(b: Builder, x: Value) -> Value:
    return b(aten.to.dtype, b(aten.mul.Tensor, x, 3.0), torch.int64)


def complexed(b: Builder, x: Value) -> Value:
    return b(aten.complex.default, x, b(aten.sin.default, x))


# --- elementwise ------------------------------------------------------------------------------

add("""abs neg exp exp2 expm1 square sign sgn floor ceil round trunc frac sin cos atan
       tanh sinh cosh asinh
       erf erfc sigmoid relu relu6 gelu silu mish elu selu celu leaky_relu
       hardswish hardsigmoid hardtanh
       softplus hardshrink softshrink log_sigmoid nan_to_num isnan isinf isfinite logical_not
       contiguous clone alias detach positive zeros_like ones_like zero conj resolve_conj
       resolve_neg conj_physical real angle deg2rad rad2deg lift_fresh lift_fresh_copy
       sinc i0 reciprocal""",
    lambda b, op, x: op(x))  # fmt: skip
add(
    "log log2 log10 log1p sqrt rsqrt asin acos atanh erfinv logit lgamma digamma tan",
    lambda b, op, x: op(positive(b, x)),
)
add("acosh", lambda b, op, x: op(b(aten.add.Tensor, positive(b, x), 1.0)))
add("_conj", lambda b, op, x: b(aten.imag.default, op(complexed(b, x))))
add("imag", lambda b, op, x: op(complexed(b, x)))
add("threshold", lambda b, op, x: op(x, 0.1, 0.0))
add("clamp clip", lambda b, op, x: op(x, -0.5, 0.5))
add("clamp_min clamp_max fill full_like float_power", lambda b, op, x: op(x, 2.0))
add("polygamma", lambda b, op, x: op(1, positive(b, x)))
add("heaviside", lambda b, op, x: op(x, second(b, x)))
add("bitwise_not", lambda b, op, x: op(integers(b, x)))
add("to", lambda b, op, x: b(aten.to.dtype, op(x, torch.float32), torch.float64))
add("_to_copy", lambda b, op, x: op(x, dtype=torch.float32))
add("type_as", lambda b, op, x: op(integers(b, x), x))
add(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout",
    lambda b, op, x: op(x, 0.5, False),
)
add("rrelu", lambda b, op, x: op(x, 0.125, 0.3, False))
add("bernoulli", lambda b, op, x: op(positive(b, x)), noise=True)
add("rand_like randn_like", lambda b, op, x: op(x), noise=True)
add("""add sub mul div true_divide maximum minimum fmax fmin atan2 eq ne lt le gt ge copysign hypot
       logaddexp logaddexp2 subtract multiply divide greater less greater_equal less_equal not_equal
       rsub""", lambda b, op, x: op(x, second(b, x)))  # fmt: skip
add("floor_divide remainder fmod xlogy", lambda b, op, x: op(x, positive(b, x)))
add("pow", lambda b, op, x: op(positive(b, x), x))
add("tanh_backward sigmoid_backward silu_backward gelu_backward mish_backward",
    lambda b, op, x: op(second(b, x), x))  # fmt: skip
add("threshold_backward", lambda b, op, x: op(second(b, x), x, 0.1))
add("softplus_backward hardtanh_backward", lambda b, op, x: op(second(b, x), x, 0.5, 1.5))
add("leaky_relu_backward", lambda b, op, x: op(second(b, x), x, 0.1, False))
add("elu_backward", lambda b, op, x: op(second(b, x), 1.0, 1.0, 1.0, False, x))
add("complex polar", lambda b, op, x: b(aten.real.default, op(positive(b, x), second(b, x))))
add(
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__",
    lambda b, op, x: op(truth(b, x), truth(b, second(b, x))),
)
add(
    "__lshift__ __rshift__ bitwise_left_shift bitwise_right_shift",
    lambda b, op, x: op(integers(b, x), 1),
)
add("where", lambda b, op, x: op(truth(b, x), x, second(b, x)))
add("masked_fill", lambda b, op, x: op(x, truth(b, second(b, x)), 0.5))
add("copy", lambda b, op, x: op(x, second(b, x)))
add("lerp", lambda b, op, x: op(x, second(b, x), 0.3))
add("addcmul", lambda b, op, x: op(x, x, second(b, x)))
add("addcdiv", lambda b, op, x: op(x, x, positive(b, x)))
add("expand_as", lambda b, op, x: op(b.param(x.width), x))
add("prelu", lambda b, op, x: op(x, b.param(x.shape[1])), "channels")
add("_prelu_kernel", lambda b, op, x: op(x, b.param(1, x.shape[1], 1)), "channels")
add("view_as_real", lambda b, op, x: b(aten.sum.dim_IntList, op(complexed(b, x)), [-1]))
add(
    "view_as_complex",
    lambda b, op, x: b(aten.real.default, op(b(aten.stack.default, [x, second(b, x)], -1))),
)
add("tril triu", lambda b, op, x: op(x), holds=True)
add(
    "masked_scatter",
    lambda b, op, x: op(
        x,
        b(aten.expand.default, truth(b, b(aten.slice.Tensor, b.inputs[0], 2, 0, 1)), list(x.shape)),
        second(b, x),
    ),
)

add(
    "masked_scatter",
    lambda b, op, x: op(x, truth(b, second(b, x)), second(b, x)),
    holds=True,
)
add("type_as", lambda b, op, x: op(x, integers(b, b.param(x.width + 1))))
add("broadcast_tensors", lambda b, op, x: _gate(b, op([x, b.param(x.width)])))
add(
    "meshgrid",
    lambda b, op, x: b(
        aten.add.Tensor,
        x,
        b(aten.slice.Tensor, op([b.param(6), b.param(x.width)])[1], 0, 0, 1),
    ),
)
add("poisson", lambda b, op, x: op(positive(b, x)), noise=True)
add("uniform exponential normal_functional cauchy log_normal", lambda b, op, x: op(x), noise=True)
add("geometric", lambda b, op, x: op(x, 0.5), noise=True)
add("random", lambda b, op, x: op(x), noise=True)

# --- contractions -----------------------------------------------------------------------------

add("linear", lambda b, op, x: op(x, b.param(6, x.width), b.param(6)))
add("matmul", lambda b, op, x: op(x, b.param(x.width, 6)))


def row(b: Builder, x: Value) -> Value:
    """[2, 6, 8] -> [6, 8]"""
    return b(aten.select.int, x, 0, 0)


add("mm", lambda b, op, x: op(row(b, x), b.param(x.width, 6)))
add("bmm", lambda b, op, x: op(x, b.param(2, x.width, 6)))
add("mv", lambda b, op, x: op(b.param(6, x.width), b(aten.select.int, row(b, x), 0, 0)))
add(
    "dot vdot linalg_vecdot",
    lambda b, op, x: b(
        aten.reshape.default, op(b(aten.select.int, row(b, x), 0, 0), b.param(x.width)), [1, 1]
    ),
)
add("addmm", lambda b, op, x: op(b.param(6), row(b, x), b.param(x.width, 6)))
add("baddbmm", lambda b, op, x: op(b.param(2, 6, 6), x, b.param(2, x.width, 6)))
add(
    "addmv",
    lambda b, op, x: op(b.param(6), b.param(6, x.width), b(aten.select.int, row(b, x), 0, 0)),
)
add("addbmm", lambda b, op, x: op(b.param(6, 6), x, b.param(2, x.width, 6)))
add("tensordot", lambda b, op, x: op(x, b.param(6, x.width), [2], [1]))
add(
    "tensordot",
    lambda b, op, x: op(
        b(aten.reshape.default, x, [2, 3, 2, x.width]), b.param(2, x.width, 5), [2, 3], [0, 1]
    ),
)
add("outer ger", lambda b, op, x: op(b.param(3), b(aten.select.int, row(b, x), 0, 0)))
add(
    "bilinear",
    lambda b, op, x: op(x, second(b, x), b.param(4, x.width, x.width), b.param(4)),
)
add(
    "kron",
    lambda b, op, x: b(aten.linear.default, x, op(b.param(3, x.width // 2), b.param(2, 2))),
)
add("einsum", lambda b, op, x: op("nlc,cd->nld", [x, b.param(x.width, 6)]))
add("einsum", lambda b, op, x: op("...c,dc", [x, b.param(6, x.width)]))
add(
    "embedding",
    lambda b, op, x: b(aten.add.Tensor, x, op(b.param(7, x.width), b.indices([1, 0, 6, 2, 3, 3]))),
)
add(
    "embedding_bag _embedding_bag",
    lambda b, op, x: b(
        aten.add.Tensor,
        x,
        b(
            aten.select.int,
            op(b.param(7, x.width), b.indices([1, 0, 6, 2, 3, 3]), b.indices([0, 3]))[0],
            0,
            1,
        ),
    ),
)


def _rows(b: Builder, x: Value) -> Value:
    return b(aten.unsqueeze.default, x, 1)


def _largest(b: Builder, op: Op, x: Value) -> Value:
    """The largest value of each unit in a bag, and the row where it was found."""
    bags = op(b.param(7, x.width), b.indices([1, 0, 6, 2, 3, 3]), b.indices([0, 3]), False, 2)
    rows = b(aten.to.dtype, bags[-1], torch.float64)
    return b(aten.add.Tensor, x, b(aten.select.int, b(aten.sub.Tensor, bags[0], rows), 0, 1))


add("embedding_bag", _largest)
add("conv1d", lambda b, op, x: op(x, b.param(6, x.shape[1], 3), b.param(6), [1], [1]), "channels")
add("conv2d", lambda b, op, x: op(x, b.param(5, x.shape[1], 3, 3), None, [1, 1], [1, 1]), "image")
add("conv2d", lambda b, op, x: op(x, b.param(x.shape[1], 1, 3, 3), b.param(x.shape[1]), [1, 1],
                                  [1, 1],
                                  [1, 1], x.shape[1]), "image")  # fmt: skip
add("conv2d", lambda b, op, x: op(x, b.param(x.shape[1] // 2 * 3, 2, 1, 1), None, [1, 1], [0, 0],
                                  [1, 1],
                                  x.shape[1] // 2), "image")  # fmt: skip
add(
    "conv3d",
    lambda b, op, x: op(b(aten.unsqueeze.default, x, 2), b.param(5, x.shape[1], 1, 1, 1)),
    "image",
)
# A kernel as wide as the row that it reads sums over the width; one of 1 leaves the width alone.
add("conv2d", lambda b, op, x: op(_rows(b, x), b.param(5, 1, 2, x.width), b.param(5)))
add("conv2d", lambda b, op, x: op(_rows(b, x), b.param(5, 1, 3, 1), b.param(5)))
add("convolution", lambda b, op, x: op(x, b.param(6, x.shape[1], 1), b.param(6), [1], [0], [1],
                                       False,
                                       [0], 1), "channels")  # fmt: skip
add("conv_transpose1d", lambda b, op, x: op(x, b.param(x.shape[1], 6, 3), b.param(6)), "channels")
add("conv_transpose2d", lambda b, op, x: op(x, b.param(x.shape[1], 5, 2, 2), None, [2, 2]), "image")
add(
    "conv_transpose3d",
    lambda b, op, x: op(b(aten.unsqueeze.default, x, 2), b.param(x.shape[1], 5, 1, 1, 1)),
    "image",
)
add("scaled_dot_product_attention", lambda b, op, x: _attended(b, op, x))


def _attended(b: Builder, op: Op, x: Value) -> Value:
    q, k, v = (_heads(b, b(aten.linear.default, x, b.param(x.width, x.width))) for _ in range(3))
    out = b(aten.transpose.int, op(q, k, v), 1, 2)
    return b(aten.flatten.using_ints, out, 2)


def _heads(b: Builder, x: Value) -> Value:
    return b(aten.transpose.int, b(aten.reshape.default, x, [2, 6, -1, 2]), 1, 2)


add(
    "_weight_norm",
    lambda b, op, x: b(aten.linear.default, x, op(b.param(6, x.width), b.param(6, 1), 0)),
)


def _volume_back(b: Builder, op: Op, x: Value) -> Value:
    deep = b(aten.unsqueeze.default, x, 2)
    pooled = b(aten.max_pool3d_with_indices.default, deep, [1, 2, 2])
    return op(*pooled, [1, 4, 4], [1, 2, 2], [0, 0, 0])


def _packed(b: Builder, x: Value) -> tuple[Value, Value]:
    """The steps of two sequences of other lengths, and how many there are at each time."""
    return b(aten._pack_padded_sequence.default, x, b.indices([6, 4]), True)


def _recurrent(gates: int, cells: int, *, pack: bool = False) -> Body:
    """Two layers of 4 units, both directions."""

    def body(b: Builder, op: Op, x: Value) -> Value:
        params, width = [], x.width
        for _ in range(2):
            for _ in range(2):
                params += [b.param(gates * 4, width, scale=0.3), b.param(gates * 4, 4, scale=0.3),
                           b.param(gates * 4), b.param(gates * 4)]  # fmt: skip
            units = params[-3].width
            width = 2 * units
        states = [b(aten.zeros.default, [4, 2, units], dtype=torch.float64) for _ in range(cells)]
        hx = states if cells > 1 else states[0]
        if pack:
            steps = op(*_packed(b, x), hx, params, True, 2, 0.0, False, True)[0]
            return b(aten.unsqueeze.default, steps, 0)
        return op(x, hx, params, True, 2, 0.0, False, True, True)[0]

    return body


def _cell(gates: int, cells: int) -> Body:
    def body(b: Builder, op: Op, x: Value) -> Value:
        weights = [b.param(gates * 4, x.width), b.param(gates * 4, 4)]
        biases = [b.param(gates * 4), b.param(gates * 4)]
        states = [b(aten.zeros.default, [6, weights[1].width], dtype=torch.float64)] * cells
        return first(op(row(b, x), states if cells > 1 else states[0], *weights, *biases))

    return body


add("lstm", _recurrent(4, 2))
add("gru", _recurrent(3, 1))
add("gru", _recurrent(3, 1, pack=True))
add("_pack_padded_sequence", lambda b, op, x: op(x, b.indices([6, 4]), True)[0])
add("_pad_packed_sequence", lambda b, op, x: op(*_packed(b, x), True, 0.0, 6)[0])
add("rnn_tanh rnn_relu", _recurrent(1, 1))
add("lstm_cell", _cell(4, 2))
add("gru_cell", _cell(3, 1))
add("rnn_tanh_cell rnn_relu_cell", _cell(1, 1))

# --- statistics -------------------------------------------------------------------------------

add("layer_norm", lambda b, op, x: op(x, [x.width], b.param(x.width), b.param(x.width)))
add(
    "native_layer_norm",
    lambda b, op, x: op(x, [x.width], b.param(x.width), b.param(x.width), 1e-5)[0],
)
add("rms_norm", lambda b, op, x: op(x, [x.width], b.param(x.width), 1e-5))
add("_fused_rms_norm", lambda b, op, x: op(x, [x.width], b.param(x.width), 1e-5)[0])
add(
    "group_norm",
    lambda b, op, x: op(x, x.shape[1] // 2, b.param(x.shape[1]), b.param(x.shape[1])),
    "image",
)
add("group_norm", lambda b, op, x: op(x, 1, b.param(x.shape[1]), b.param(x.shape[1])), "image")
add("batch_norm", lambda b, op, x: op(x, b.param(x.shape[1]), b.param(x.shape[1]),
                                      b.buffer(x.shape[1]), b.buffer(x.shape[1]), False, 0.1,
                                      1e-5, False), "image")  # fmt: skip
add("instance_norm", lambda b, op, x: op(x, b.param(x.shape[1]), b.param(x.shape[1]), None, None,
                                         True, 0.1,
                                         1e-5, False), "image")  # fmt: skip
add("mean sum amax amin logsumexp", lambda b, op, x: b(aten.sub.Tensor, x, op(x, [-1], True)))
add("mean sum amax amin logsumexp nansum nanmean", lambda b, op, x: op(x, [1]))
add("any all", lambda b, op, x: op(truth(b, x), 1))
add("prod argmax argmin", lambda b, op, x: op(x, 1))
add("argmax argmin", lambda b, op, x: op(x, 2, True), holds=True)
add("max min median nanmedian mode", lambda b, op, x: op(x, 2, True)[1], holds=True)
add("count_nonzero", lambda b, op, x: op(truth(b, x), [1]))
add("var std", lambda b, op, x: op(x, [1], correction=1))
add("var_mean std_mean", lambda b, op, x: op(x, [1], correction=0)[1])
add("linalg_vector_norm", lambda b, op, x: b(aten.mul.Tensor, x, op(x, 2, [-1], True)))
add("norm", lambda b, op, x: op(x, 2, [1]))
add("max min median nanmedian mode", lambda b, op, x: op(x, 1)[0])
add("aminmax", lambda b, op, x: op(x, dim=1)[0])
add("max min", lambda b, op, x: op(x, second(b, x)))
add("softmax log_softmax _safe_softmax", lambda b, op, x: op(x, 1))
add("_softmax _log_softmax", lambda b, op, x: op(x, 1, False))
add("softmax log_softmax", lambda b, op, x: op(x, -1))
add("cumsum cumprod logcumsumexp", lambda b, op, x: op(x, 1))
add("cummax cummin", lambda b, op, x: op(x, 1)[0])
add("cummax cummin", lambda b, op, x: op(x, 2)[1], holds=True)
add("diff", lambda b, op, x: op(x), holds=True)
add("diff", lambda b, op, x: op(x, 1, 1))
add("topk kthvalue", lambda b, op, x: op(x, 2, -1)[0], holds=True)
add("topk", lambda b, op, x: op(x, 2, 1)[0])
add("kthvalue", lambda b, op, x: op(x, 2, 1)[0])
add("sort", lambda b, op, x: op(x, -1)[0], holds=True)
add("argsort", lambda b, op, x: op(x, -1), holds=True)
add("glu", lambda b, op, x: op(b(aten.linear.default, x, b.param(8, x.width)), -1))
add("cosine_similarity", lambda b, op, x: op(x, second(b, x), 1))
add("pairwise_distance", lambda b, op, x: op(x, second(b, x)))
add("cdist", lambda b, op, x: op(x, second(b, x)))
add("_cdist_forward", lambda b, op, x: op(x, second(b, x), 2.0, None))

# --- rearranging ------------------------------------------------------------------------------

add("view reshape view_copy _unsafe_view", lambda b, op, x: op(x, [2, 3, 2, x.width]))
add("view reshape", lambda b, op, x: op(x, [2, 6, x.width // 2, 2]))
add("flatten", lambda b, op, x: op(x, 0, 1))
add("unflatten", lambda b, op, x: b(aten.sum.dim_IntList, op(x, -1, [x.width // 2, 2]), [-1]))
add("ravel", lambda b, op, x: b(aten.reshape.default, op(x), [2, 6, x.width]))
add("squeeze", lambda b, op, x: op(b(aten.unsqueeze.default, x, 1)))
add("unsqueeze", lambda b, op, x: op(x, 1))
add("atleast_1d atleast_2d atleast_3d", lambda b, op, x: op(x))
add("reshape_as view_as", lambda b, op, x: op(b(aten.flatten.using_ints, x, 0, 1), second(b, x)))
add("transpose swapaxes swapdims", lambda b, op, x: op(x, 0, 1))
add("t numpy_T", lambda b, op, x: b(aten.linear.default, op(row(b, x)), b.param(4, 6)), holds=False)
add("mT adjoint mH", lambda b, op, x: b(aten.transpose.int, op(x), 1, 2))
add("matrix_H", lambda b, op, x: b(aten.transpose.int, op(row(b, x)), 0, 1))
add("permute", lambda b, op, x: op(x, [1, 0, 2]))
add("movedim moveaxis", lambda b, op, x: b(aten.transpose.int, op(x, -1, 0), 0, -1))
add(
    "expand broadcast_to",
    lambda b, op, x: b(aten.add.Tensor, x, op(b.param(1, 1, x.width), list(x.shape))),
)
add("repeat tile", lambda b, op, x: op(x, [1, 2, 3]))
add("repeat_interleave", lambda b, op, x: op(x, 3, 2))
add("repeat_interleave", lambda b, op, x: b(aten.reshape.default, op(x, 2), [2, 6, x.width * 2]))
add(
    "cat concat concatenate",
    lambda b, op, x: op([x, b(aten.linear.default, x, b.param(5, x.width))], -1),
)
add("hstack vstack", lambda b, op, x: op([x, second(b, x)]))
add("stack", lambda b, op, x: b(aten.sum.dim_IntList, op([x, second(b, x)], 2), [2]))


def _gate(b: Builder, pieces: Any) -> Value:
    return b(aten.mul.Tensor, pieces[0], pieces[1])


def _wide(b: Builder, x: Value, times: int = 2) -> Value:
    return b(aten.linear.default, x, b.param(times * 4, x.width))


add(
    "split unsafe_split split_copy",
    lambda b, op, x: _gate(b, op(wide := _wide(b, x), wide.width // 2, -1)),
)
add(
    "split_with_sizes unsafe_split_with_sizes split_with_sizes_copy",
    lambda b, op, x: _gate(b, op(wide := _wide(b, x), [wide.width // 2] * 2, -1)),
)
add("chunk unsafe_chunk", lambda b, op, x: _gate(b, op(_wide(b, x), 2, -1)))
add("tensor_split", lambda b, op, x: _gate(b, op(_wide(b, x), 2, -1)))
add("unbind", lambda b, op, x: _gate(b, op(x, 1)))
add("slice", lambda b, op, x: op(x, 1, 1, 5, 2))
add("narrow", lambda b, op, x: op(x, 1, 2, 3))
# The first unit, which every prefix has.
add("slice", lambda b, op, x: b(aten.mul.Tensor, op(x, -1, 0, 1), second(b, x)))
add("narrow", lambda b, op, x: b(aten.mul.Tensor, x, op(x, -1, 0, 1)))
add("select", lambda b, op, x: op(x, 1, 2))
add("select", lambda b, op, x: b(aten.unsqueeze.default, op(x, 2, 3), -1), holds=True)
add("slice_scatter", lambda b, op, x: op(x, b(aten.slice.Tensor, second(b, x), 1, 0, 2), 1, 2, 4))
add("select_scatter", lambda b, op, x: op(x, b(aten.select.int, second(b, x), 1, 0), 1, 2))
add("flip", lambda b, op, x: op(x, [1]))
add("flip", lambda b, op, x: op(x, [-1]), holds=True)
add("roll", lambda b, op, x: op(x, [1], [1]))
add("fft_fftshift fft_ifftshift", lambda b, op, x: op(x, [1]))
add("fft_fftshift fft_ifftshift", lambda b, op, x: op(x, [-1]), holds=True)
add("renorm", lambda b, op, x: op(x, 2.0, 2, 0.5))
add("renorm", lambda b, op, x: op(x, 2.0, 1, 0.5))
add("roll", lambda b, op, x: op(x, [1], [2]), holds=True)
add("pad", lambda b, op, x: op(x, [1, 2]))
add("constant_pad_nd", lambda b, op, x: op(x, [2, 1, 1, 0]))
add("reflection_pad1d replication_pad1d", lambda b, op, x: op(x, [1, 1]), "channels")
add("reflection_pad2d replication_pad2d", lambda b, op, x: op(x, [1, 1, 1, 1]), "image")
add(
    "reflection_pad3d replication_pad3d",
    lambda b, op, x: op(b(aten.stack.default, [x, x], 2), [1, 1, 1, 1, 1, 1]),
    "image",
)
add(
    "pixel_shuffle",
    lambda b, op, x: op(b(aten.conv2d.default, x, b.param(4 * 3, x.shape[1], 1, 1)), 2),
    "image",
)
add("pixel_unshuffle", lambda b, op, x: op(x, 2), "image")
add("channel_shuffle native_channel_shuffle", lambda b, op, x: op(x, 2), "image", holds=True)
add("unfold", lambda b, op, x: b(aten.sum.dim_IntList, op(x, 1, 3, 1), [-1]))
add("im2col", lambda b, op, x: op(x, [2, 2], [1, 1], [0, 0], [2, 2]), "image")
add(
    "col2im",
    lambda b, op, x: op(
        b(aten.im2col.default, x, [2, 2], [1, 1], [0, 0], [2, 2]),
        [4, 4],
        [2, 2],
        [1, 1],
        [0, 0],
        [2, 2],
    ),
    "image",
)
add(
    "as_strided",
    lambda b, op, x: op(b(aten.clone.default, x), list(x.shape), [6 * x.width, x.width, 1]),
    holds=True,
)
add("diagonal", lambda b, op, x: b(aten.transpose.int, op(x, 0, 0, 1), 0, 1))

# --- indices ----------------------------------------------------------------------------------

add("index _unsafe_index", lambda b, op, x: op(x, [None, b.indices([0, 2, 2])]))
add("index", lambda b, op, x: op(x, [None, None, b.indices([0, 7, 2])]), holds=True)
add(
    "index_put index_put_ _unsafe_index_put",
    lambda b, op, x: op(
        b(aten.clone.default, x),
        [None, b.indices([0, 2])],
        b(aten.slice.Tensor, second(b, x), 1, 0, 2),
    ),
)
add("index_select", lambda b, op, x: op(x, 1, b.indices([0, 2, 2])))
add("index_select", lambda b, op, x: op(x, 2, b.indices([0, 2, 2])), holds=True)


def _places(b: Builder, x: Value) -> Value:
    """[2, 3, C] of positions along dim 1."""
    index = b(aten.reshape.default, b.indices([0, 2, 4]), [1, 3, 1])
    return b(aten.expand.default, index, [2, 3, x.width])


def _part(b: Builder, x: Value) -> Value:
    return b(aten.slice.Tensor, second(b, x), 1, 0, 3)


add("gather", lambda b, op, x: op(x, 1, _places(b, x)))
add("take_along_dim", lambda b, op, x: op(x, _places(b, x), 1))
add("scatter scatter_add", lambda b, op, x: op(x, 1, _places(b, x), _part(b, x)))
add("scatter_reduce", lambda b, op, x: op(x, 1, _places(b, x), _part(b, x), "sum"))
add("index_add index_copy", lambda b, op, x: op(x, 1, b.indices([0, 2, 4]), _part(b, x)))
add("index_fill", lambda b, op, x: op(x, 1, b.indices([0, 2, 4]), 0.5))
add("index_reduce", lambda b, op, x: op(x, 1, b.indices([0, 2, 4]), _part(b, x), "amax"))
add("isin", lambda b, op, x: op(integers(b, x), b.indices([0, 1])), holds=True)
add(
    "take",
    lambda b, op, x: b(aten.reshape.default, op(x, b.indices([0, 9, 4])), [1, 3]),
    holds=True,
)
add("nonzero", lambda b, op, x: b(aten.slice.Tensor, op(truth(b, x)), 0, 0, 4), holds=True)
add(
    "masked_select",
    lambda b, op, x: b(
        aten.reshape.default, b(aten.slice.Tensor, op(x, truth(b, x)), 0, 0, 4), [1, 4]
    ),
    holds=True,
)
add("histc", lambda b, op, x: b(aten.reshape.default, op(x, 4), [1, 4]), holds=True)
add(
    "bincount",
    lambda b, op, x: b(
        aten.reshape.default,
        op(b(aten.flatten.using_ints, b(aten.to.dtype, truth(b, x), torch.int64)), None, 2),
        [1, 2],
    ),
    holds=True,
)
add(
    "_unique2",
    lambda b, op, x: b(aten.reshape.default, b(aten.slice.Tensor, op(x)[0], 0, 0, 2), [1, 2]),
    holds=True,
)
add("unique_dim", lambda b, op, x: op(x, 0)[0], holds=True)
add("bucketize", lambda b, op, x: op(x, b.buffer(1)), holds=True)
add(
    "searchsorted",
    lambda b, op, x: op(b(aten.cumsum.default, positive(b, x), -1), positive(b, x)),
    holds=True,
)
add(
    "one_hot",
    lambda b, op, x: b(
        aten.sum.dim_IntList, op(b(aten.to.dtype, truth(b, x), torch.int64), 2), [-1]
    ),
    holds=True,
)

# --- made from numbers ------------------------------------------------------------------------

FLOAT = {"dtype": torch.float64}
add(
    "zeros ones rand randn",
    lambda b, op, x: b(aten.add.Tensor, x, op([x.width], **FLOAT)),
    noise=True,
)
add("full", lambda b, op, x: b(aten.add.Tensor, x, op([x.width], 0.5, **FLOAT)))
add(
    "new_zeros new_ones",
    lambda b, op, x: b(aten.add.Tensor, x, op(x, [x.width])),
    noise=True,
)
add("new_full", lambda b, op, x: b(aten.add.Tensor, x, op(x, [x.width], 0.5)))
add("randint", lambda b, op, x: b(aten.add.Tensor, x, op(5, [x.width])), noise=True)
add("arange", lambda b, op, x: b(aten.add.Tensor, x, op(x.width, **FLOAT)))
add("scalar_tensor", lambda b, op, x: b(aten.mul.Tensor, x, op(0.5, **FLOAT)))
add(
    "linspace logspace",
    lambda b, op, x: b(aten.add.Tensor, x, op(0, 1, x.width, **FLOAT)),
    holds=True,
)
add(
    "tril_indices triu_indices",
    lambda b, op, x: b(aten.add.Tensor, x, b(aten.sum.default, op(x.width, x.width))),
    noise=True,
)
add("eye", lambda b, op, x: b(aten.matmul.default, x, op(x.width, **FLOAT)), holds=True)
add("randperm", lambda b, op, x: b(aten.add.Tensor, x, op(x.width)), holds=True, noise=True)
add(
    "hann_window hamming_window",
    lambda b, op, x: b(aten.mul.Tensor, x, op(x.width, **FLOAT)),
    holds=True,
)

# --- space and frequency ----------------------------------------------------------------------


def cube(b: Builder, x: Value) -> Value:
    """[2, 8, 4, 4] -> [2, 8, 2, 4, 4]"""
    return b(aten.stack.default, [x, b(aten.sin.default, x)], 2)


def first(value: Any) -> Value:
    return value[0] if isinstance(value, tuple) else value


add("max_pool1d avg_pool1d max_pool1d_with_indices", lambda b, op, x: first(op(x, [2])), "channels")
add("max_unpool2d",
    lambda b, op, x: op(*b(aten.max_pool2d_with_indices.default, x, [2, 2]), [4, 4]),
    "image")  # fmt: skip
add("max_unpool3d", lambda b, op, x: _volume_back(b, op, x), "image")
add("max_pool2d avg_pool2d max_pool2d_with_indices", lambda b, op, x: first(op(x, [2, 2])), "image")
add(
    "max_pool3d avg_pool3d max_pool3d_with_indices",
    lambda b, op, x: first(op(cube(b, x), [1, 2, 2])),
    "image",
)
add("adaptive_avg_pool1d adaptive_max_pool1d", lambda b, op, x: first(op(x, [2])), "channels")
add(
    "adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d",
    lambda b, op, x: first(op(x, [2, 2])),
    "image",
)
add(
    "adaptive_avg_pool3d adaptive_max_pool3d _adaptive_avg_pool3d",
    lambda b, op, x: first(op(cube(b, x), [1, 2, 2])),
    "image",
)
add("upsample_nearest1d _upsample_nearest_exact1d", lambda b, op, x: op(x, [9]), "channels")
add("upsample_nearest2d _upsample_nearest_exact2d", lambda b, op, x: op(x, [6, 6]), "image")
add(
    "upsample_nearest3d _upsample_nearest_exact3d",
    lambda b, op, x: op(cube(b, x), [2, 6, 6]),
    "image",
)
add("upsample_linear1d", lambda b, op, x: op(x, [9], False), "channels")
add(
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    lambda b, op, x: op(x, [6, 6], False),
    "image",
)
add("upsample_trilinear3d", lambda b, op, x: op(cube(b, x), [2, 6, 6], False), "image")


def grid(b: Builder, x: Value, rank: int) -> Value:
    shape = (2, *(3,) * rank, rank)
    return b(aten.tanh.default, b(aten.mul.Tensor, b.param(*shape), 0.3))


add("grid_sampler grid_sampler_2d", lambda b, op, x: op(x, grid(b, x, 2), 0, 0, False), "image")
add("grid_sampler_3d", lambda b, op, x: op(cube(b, x), grid(b, x, 3), 0, 0, False), "image")
add("fft_fft fft_ifft fft_rfft fft_ihfft", lambda b, op, x: b(aten.abs.default, op(x, None, 1)))
# A transform of the width is the narrow model's own; one that changes the length holds it whole.
add("fft_fft fft_ifft", lambda b, op, x: b(aten.abs.default, op(x, None, -1)))
add("fft_fft", lambda b, op, x: b(aten.abs.default, op(x, 8, -1)), holds=True)
add("fft_rfft", lambda b, op, x: b(aten.abs.default, op(x, None, -1)), holds=True)
add("stft", lambda b, op, x: b(aten.abs.default, op(row(b, x), 4, return_complex=True)), holds=True)
add(
    "istft",
    lambda b, op, x: op(b(aten.stft.default, row(b, x), 4, return_complex=True), 4),
    holds=True,
)
add("fft_irfft fft_hfft", lambda b, op, x: op(complexed(b, x), None, 1))
add(
    "fft_fft2 fft_ifft2 fft_rfft2 fft_fftn fft_ifftn fft_rfftn",
    lambda b, op, x: b(aten.abs.default, op(x, None, [0, 1])),
)
add("fft_irfft2 fft_irfftn", lambda b, op, x: op(complexed(b, x), None, [0, 1]))
