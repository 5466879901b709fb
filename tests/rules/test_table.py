"""Every field of every row against the op itself, and `mk.rule` for a user's own op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.overrides import TorchFunctionMode

import matryoshkafy as mk
from matryoshkafy.graph.vocabulary import BASICS, WRITES, Basics
from matryoshkafy.kernels.reductions import KINDS
from matryoshkafy.rewrite.actions import FAST, NORMS
from matryoshkafy.rules import OPS, Op, Walk, Weight, op_of
from matryoshkafy.rules.table import Facts
from tests.rules.kept import rules_kept

ROWS = sorted(OPS)
GONE = {"float", "softmin", "softsign", "tanhshrink"}  # functions of Python, spelled by other ops


def arguments(key: str) -> set[str]:
    """Return the names of the arguments of all overloads of an op of ATen."""
    packet = getattr(torch.ops.aten, key)
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return {a.name for o in overloads for a in o._schema.arguments}


def aten_rows() -> Iterator[Op]:
    """Yield the rows of ops that ATen has."""
    for key in ROWS:
        if "::" not in key and key not in GONE and hasattr(torch.ops.aten, key):
            yield OPS[key]


def test_named_arguments_are_the_ops_own() -> None:
    for row in aten_rows():
        named = {*row.parameters, *(row.weights if not callable(row.weights) else ())}
        named |= {row.sizes} if isinstance(row.sizes, str) else set()
        named |= {n for n in (row.training, row.factor) if n}
        assert named <= arguments(row.key), f"{row.key}: {sorted(named - arguments(row.key))}"


def test_statistics_and_nested_operators_exist() -> None:
    for row in OPS.values():
        assert row.statistic in {"", "normalise", *KINDS}, row.key
        assert row.nested in {"", *FAST, *NORMS}, row.key
        assert (row.statistic == "normalise") == (row.nested in NORMS), row.key


def test_a_statistic_is_the_op() -> None:
    x = drawn(3, 5)
    for row in (OPS[k] for k in ROWS if OPS[k].statistic not in ("", "normalise")):
        op = getattr(torch.ops.aten, row.key)
        found = op(x, 2, [-1], True) if row.statistic == "norm" else op(x, dim=[-1], keepdim=True)
        torch.testing.assert_close(KINDS[row.statistic](x, [-1]), found, msg=row.key)


def test_a_nested_norm_of_one_level_is_the_op() -> None:
    x, gain, runs = drawn(4, 6, 2), drawn(6), [6, 0]
    last = x.transpose(1, 2)
    given = {
        "layer_norm": (last, ([6], gain, gain, 1e-5), (gain, gain)),
        "rms_norm": (last, ([6], gain, 1e-5), (gain,)),
        "group_norm": (x, (1, gain, gain, 1e-5), (gain, gain)),
    }
    for row in (OPS[k] for k in ROWS if OPS[k].nested in NORMS):
        value, own, affine_of = given[row.key]
        nested = NORMS[row.nested].target(value, *affine_of, 1e-5, runs, False)
        torch.testing.assert_close(nested, getattr(torch.ops.aten, row.key)(value, *own))


def test_what_has_a_mode_follows_it() -> None:
    for row in aten_rows():
        modes = arguments(row.key) & {"train", "training"}
        assert modes == ({row.training} if row.training else set()) or row.key in MODELESS, row.key


# They return what a backward reads, too, so that no forward of a module calls them.
MODELESS = {"native_dropout", "_fused_dropout"}


def test_sizes_follow_the_width() -> None:
    """Every op whose schema has an argument called size or shape says that it is one."""
    for row in aten_rows():
        if arguments(row.key) & {"size", "shape", "normalized_shape", "sizes"} and row.axes:
            assert row.sizes is not None or row.key in SIZELESS, row.key


# Sizes of windows along a dim that stays whole; what is read by strides stays whole.
SIZELESS = {"unfold", "as_strided"}


@pytest.mark.parametrize("key", [k for k in ROWS if OPS[k].scaling])
def test_scaling_is_linear_in_the_tensor(key: str) -> None:
    op, x = getattr(torch.ops.aten, key).Tensor, torch.randn(5, dtype=torch.float64)
    three = torch.tensor(3.0, dtype=torch.float64)
    assert torch.allclose(op(2 * x, three), 2 * op(x, three))


@pytest.mark.parametrize("key", [k for k in ROWS if OPS[k].nonlinear])
def test_activations_are_nonlinear_elementwise(key: str) -> None:
    op, x = getattr(torch.ops.aten, key), torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert not torch.allclose(op(x) + op(-x), torch.zeros_like(x)) or key == "tanh"
    assert torch.equal(op(x[2:5]), op(x)[2:5]) and OPS[key].elementwise


@pytest.mark.parametrize("key", [k for k in ROWS if OPS[k].casts])
def test_casts_keep_values(key: str) -> None:
    x = torch.arange(5.0)
    packet = getattr(torch.ops.aten, key)
    cast = packet(x, torch.zeros(1, dtype=torch.float64)) if key == "type_as" else packet(
        x, dtype=torch.float64
    )  # fmt: skip
    assert cast.dtype == torch.float64 and torch.equal(cast.float(), x)


FILLING = {
    "where": lambda op, x: op.ScalarOther(x < 0, x, -torch.inf),
    "masked_fill": lambda op, x: op.Scalar(x, x > 0, -torch.inf),
    "fill": lambda op, x: op.Scalar(x, -torch.inf),
    "full": lambda op, x: op([3], -torch.inf),
    "new_full": lambda op, x: op(x, [3], -torch.inf),
    "full_like": lambda op, x: op(x, -torch.inf),
    "scalar_tensor": lambda op, x: op(-torch.inf),
    "triu": lambda op, x: op(x - torch.inf),
    "tril": lambda op, x: op(x - torch.inf),
    "pad": lambda op, x: op(x, [1, 0], "constant", -torch.inf),
    "constant_pad_nd": lambda op, x: op(x, [1, 0], -torch.inf),
}


def test_what_fills_may_give_infinity() -> None:
    assert {k for k in ROWS if OPS[k].fills} == set(FILLING)
    for key, run in FILLING.items():
        assert run(getattr(torch.ops.aten, key), torch.ones(3, 3)).isinf().any(), key


def test_counts_and_lookups() -> None:
    assert {k for k in ROWS if OPS[k].counts} == {"arange"}
    assert torch.equal(torch.arange(3), torch.arange(7)[:3])
    embeddings = {"embedding", "embedding_bag", "_embedding_bag"}
    assert {k for k in ROWS if OPS[k].lookup} == embeddings | {
        "index", "_unsafe_index", "index_select",
    }  # fmt: skip


@pytest.mark.parametrize("key", [k for k in ROWS if OPS[k].joins])
def test_what_joins_does_as_well_without_the_empty(key: str) -> None:
    op, x = getattr(torch.ops.aten, key), torch.ones(2, 3)
    along = 1 if key == "hstack" else 0
    empty = x.narrow(along, 0, 0)
    assert torch.equal(op([x, empty, x]), op([x, x]))


def test_products_have_two_tensors_without_a_place_for_parameters() -> None:
    for row in (OPS[k] for k in ROWS if OPS[k].product):
        assert not row.weight_arguments(), row.key


ROW_IDS, PAIR = torch.tensor([1, 0]), (0.3, 1.7)
UNIFORM = {
    **{f"{n}_like": lambda op, x: op(x) for n in ("zeros", "ones")},
    **{n: lambda op, x: op([5]) for n in ("zeros", "ones")},
    **{f"new_{n}": lambda op, x: op(x, [5]) for n in ("zeros", "ones")},
    "full": lambda op, x: op([5], 0.5),
    "full_like": lambda op, x: op(x, 0.5),
    "new_full": lambda op, x: op(x, [5], 0.5),
    "scalar_tensor": lambda op, x: op(0.5),
}
AA, SCATTERS = (("", ""), ("_", "_aa")), ("scatter", "scatter_add")
POOLS_2D, POOLS_3D = ("avg_pool2d", "adaptive_avg_pool2d"), ("avg_pool3d", "adaptive_avg_pool3d")
UPSAMPLES = tuple(
    f"{start}upsample_{kind}2d{end}" for kind in ("bilinear", "bicubic") for start, end in AA
)
MASK = torch.tensor([True, False, True, False])[:, None]
# Values written along the rows of x [4, 6].
WRITE = {
    **{n: lambda op, x: op(x, [0, 0, 1, 2]) for n in ("pad", "constant_pad_nd")},
    "masked_fill": lambda op, x: op(x, MASK, 0.0),
    "where": lambda op, x: op(MASK, x, x.flip(0)),
    "masked_scatter": lambda op, x: op(x, MASK.expand(4, 6), x.flip(0)),
    **{n: lambda op, x: op(x, 0, ROW_IDS[:, None].expand(2, 6), x[2:]) for n in SCATTERS},
    **{n: lambda op, x: op(x, 0, ROW_IDS, x[2:]) for n in ("index_add", "index_copy")},
    "index_put": lambda op, x: op(x, [ROW_IDS], x[2:]),
    "slice_scatter": lambda op, x: op(x, x[2:], 0, 0, 2),
    "select_scatter": lambda op, x: op(x, x[2], 0, 1),
}
# On the rows of x [4, 6]: what they do passes through a matrix on the columns.
CARRY = {
    "dropout": lambda op, x: op(x, 0.0, False),
    "native_dropout": lambda op, x: op(x, 0.0, False)[0],
    "feature_dropout": lambda op, x: op(x, 0.0, False),
    "view": lambda op, x: op(x.contiguous(), [2, 2, 6]),
    "reshape": lambda op, x: op(x, [2, 2, 6]),
    "permute": lambda op, x: op(x.reshape(2, 2, 6), [1, 0, 2]),
    "unsqueeze": lambda op, x: op(x, 0),
    "squeeze": lambda op, x: op(x[None], 0),
    "select": lambda op, x: op(x, 0, 1),
    "slice": lambda op, x: op(x, 0, 1, 3),
    "index": lambda op, x: op(x, [ROW_IDS]),
    "index_select": lambda op, x: op(x, 0, ROW_IDS),
    "gather": lambda op, x: op(x, 0, ROW_IDS[:, None].expand(2, 6)),
    "cat": lambda op, x: op([x, x], 0),
    "stack": lambda op, x: op([x, x], 0),
    "flatten": lambda op, x: op(x.reshape(2, 2, 6), 0, 1),
    "unflatten": lambda op, x: op(x, 0, [2, 2]),
    "movedim": lambda op, x: op(x.reshape(2, 2, 6), 0, 1),
    "narrow": lambda op, x: op(x, 0, 1, 2),
    "embedding": lambda op, x: op(x, ROW_IDS),
    "neg": lambda op, x: op(x),
    "split": lambda op, x: op(x, 2, 0)[1],
    "split_with_sizes": lambda op, x: op(x, [1, 3], 0)[1],
    "chunk": lambda op, x: op(x, 2, 0)[1],
    "unbind": lambda op, x: op(x, 0)[1],
    "repeat": lambda op, x: op(x, [2, 1]),
    "repeat_interleave": lambda op, x: op(x, 2, 0),
    "roll": lambda op, x: op(x, [1], [0]),
    "flip": lambda op, x: op(x, [0]),
    "tile": lambda op, x: op(x, [2, 1]),
    "swapaxes": lambda op, x: op(x.reshape(2, 2, 6), 0, 1),
    "moveaxis": lambda op, x: op(x.reshape(2, 2, 6), 0, 1),
    "mT": lambda op, x: op(x.mT),
    **{n: lambda op, x: op(x.mT[None], [2]).mT for n in ("avg_pool1d", "adaptive_avg_pool1d")},
    **{n: lambda op, x: op(maps(x), [2, 1]).movedim(1, -1) for n in POOLS_2D},
    **{n: lambda op, x: op(maps(x)[:, :, None], [1, 2, 1]).movedim(1, -1) for n in POOLS_3D},
    "upsample_nearest1d": lambda op, x: op(x.mT[None], [7]).mT,
    "upsample_linear1d": lambda op, x: op(x.mT[None], [7], False).mT,
    "upsample_nearest2d": lambda op, x: op(maps(x), [3, 4]).movedim(1, -1),
    **{n: lambda op, x: op(maps(x), [3, 4], False).movedim(1, -1) for n in UPSAMPLES},
    "sum": lambda op, x: op(x, [0]),
    "mean": lambda op, x: op(x, [0]),
}
SAME = {
    **{n: lambda op, x: op(x) for n in ("clone", "contiguous", "detach", "alias")},
    **{n: lambda op, x: op(x, dtype=torch.float32) for n in ("to", "_to_copy")},
}
ARITHMETIC = {
    "add": operator.add, "sub": operator.sub, "rsub": lambda a, b: b - a,
    "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
}  # fmt: skip
WORDS = {
    "add": "add", "sub": "subtract", "rsub": "subtract", "mul": "multiply", "div": "divide",
    "pow": "power",
}  # fmt: skip


def of(word: str) -> set[str]:
    """Return the ops whose algebra is a word."""
    return {key for key in ROWS if OPS[key].algebra == word}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def maps(x: Tensor) -> Tensor:
    """Return the columns of x [4, 6] as channels of a picture of two by two."""
    return x.mT.reshape(1, 6, 2, 2)


def test_what_is_zero_is_nothing() -> None:
    assert of("zero") == {"zeros", "zeros_like", "new_zeros"}
    for key in of("zero"):
        assert not UNIFORM[key](getattr(torch.ops.aten, key), drawn(5)).any(), key


def test_what_writes_passes_a_change_of_basis() -> None:
    x, basis = drawn(4, 6), torch.linalg.qr(drawn(6, 6))[0]
    assert of("write") == set(WRITE)
    for key, call in WRITE.items():
        op = getattr(torch.ops.aten, key)
        torch.testing.assert_close(call(op, x @ basis), call(op, x) @ basis, msg=key)


def test_what_is_like_another_has_its_own_values() -> None:
    x, other = drawn(4, 6), drawn(2, 2, 6).float()
    assert of("like") == {"type_as", "view_as", "reshape_as"}
    assert torch.equal(torch.ops.aten.type_as(x, other), x.float())
    for key in ("view_as", "reshape_as"):
        assert torch.equal(getattr(torch.ops.aten, key)(x, other), x.reshape(2, 2, 6))


def test_attention_turns_queries_with_keys_and_values_alone() -> None:
    q, k, v = drawn(3, 4, 6)
    basis = torch.linalg.qr(drawn(6, 6))[0]
    assert of("attend") == {"scaled_dot_product_attention"}
    op = torch.ops.aten.scaled_dot_product_attention
    q, k, v = (one[None, None] for one in (q, k, v))
    torch.testing.assert_close(op(q @ basis, k @ basis, v), op(q, k, v))
    torch.testing.assert_close(op(q, k, v @ basis), op(q, k, v) @ basis)


def test_what_is_uniform_has_one_value() -> None:
    assert of("uniform") <= set(UNIFORM) | {"empty"}
    for key in of("uniform") - {"empty"}:
        assert UNIFORM[key](getattr(torch.ops.aten, key), drawn(5)).unique().numel() == 1, key


def test_what_carries_passes_a_change_of_basis() -> None:
    x, basis = drawn(4, 6), torch.linalg.qr(drawn(6, 6))[0]
    assert of("carry") <= set(CARRY)
    for key in of("carry"):
        op = getattr(torch.ops.aten, key)
        torch.testing.assert_close(CARRY[key](op, x @ basis), CARRY[key](op, x) @ basis, msg=key)


def test_what_is_the_same_turned_spread_bound_or_a_length() -> None:
    x = drawn(3, 5)
    aten = torch.ops.aten
    assert of("same") <= set(SAME)
    assert all(torch.equal(SAME[k](getattr(aten, k), x.float()), x.float()) for k in of("same"))
    turned = {"t": (), "numpy_T": (), "transpose": (0, 1)}
    assert of("turn") <= set(turned)
    assert all(torch.equal(getattr(aten, k)(x, *turned[k]), x.mT) for k in of("turn"))
    spread = {"expand": [3, 5], "expand_as": x, "broadcast_to": [3, 5]}
    assert of("spread") <= set(spread)
    for key in of("spread"):
        assert torch.equal(getattr(aten, key)(x[:, :1], spread[key])[:, 4], x[:, 0]), key
    assert of("bound") == {"clamp", "clamp_min"}
    assert all(torch.equal(getattr(aten, k)(x, -1e9), x) for k in of("bound"))
    for key in of("length"):
        found = getattr(aten, key)(x, 2, [-1])
        torch.testing.assert_close(found, x.square().sum(-1).sqrt(), msg=key)


def test_arithmetic_is_what_its_word_says() -> None:
    a, b = (torch.tensor([n], dtype=torch.float64) for n in PAIR)
    for key, word in WORDS.items():
        assert OPS[key].algebra == word
        found = getattr(torch.ops.aten, key)(a, b)
        torch.testing.assert_close(found, ARITHMETIC[key](a, b), msg=key)
    assert of("power") == {"pow", "square"}
    assert torch.equal(torch.ops.aten.square(a), a * a)


READ = {
    "linear": ((2, 5), (3, 5), 1), "matmul": ((2, 5), (5, 3), 0), "mm": ((2, 5), (5, 3), 0),
    "bmm": ((2, 2, 5), (2, 5, 3), 1), "conv1d": ((1, 5, 4), (3, 5, 2), 1),
    "conv2d": ((1, 5, 4, 4), (3, 5, 2, 2), 1), "conv3d": ((1, 5, 4, 4, 4), (3, 5, 2, 2, 2), 1),
    "convolution": ((1, 5, 4, 4), (3, 5, 2, 2), 1), "addmm": ((2, 5), (5, 3), 0),
}  # fmt: skip


def test_what_is_read_may_change_places_with_the_weights() -> None:
    """A sum has no order: the same permutation on both sides changes nothing."""
    rows = {key: OPS[key].reads for key in ROWS if OPS[key].reads is not None}
    assert set(rows) == set(READ)
    order = torch.tensor([3, 1, 4, 0, 2])
    for key, reads in rows.items():
        shape, weights, into = READ[key]
        x, w = drawn(*shape), drawn(*weights)
        assert reads is not None and reads[0] in arguments(key), key
        moved = x.index_select(reads[1], order), w.index_select(into, order)
        torch.testing.assert_close(_product(key, *moved), _product(key, x, w), msg=key)


def _product(key: str, x: Tensor, w: Tensor) -> Tensor:
    op, ones = getattr(torch.ops.aten, key), [1, 1]
    if key == "convolution":
        return op(x, w, None, ones, [0, 0], ones, False, [0, 0], 1)
    return op(torch.zeros(3, dtype=x.dtype), x, w) if key == "addmm" else op(x, w)


# Operands that fit, of every product of two tensors and every op of one type.
OPERANDS = {
    **{n: ((2, 5), (5, 3)) for n in ("matmul", "mm", "_sparse_mm")},
    **{n: ((5,), (5,)) for n in ("dot", "vdot", "linalg_vecdot")},
    **{f"conv{n}d": ((1, 5, *[4] * n), (3, 5, *[2] * n)) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ((1, 5, *[4] * n), (5, 3, *[2] * n)) for n in (1, 2, 3)},
    "mv": ((3, 5), (5,)), "bmm": ((2, 2, 5), (2, 5, 3)), "linear": ((2, 5), (3, 5)),
    "tensordot": ((2, 5), (5, 3)), "scaled_dot_product_attention": ((1, 2, 4, 8), (1, 2, 4, 8)),
}  # fmt: skip
PLACES = torch.tensor([2, 0, 1])
CALLS = {
    "tensordot": lambda op, a, b: op(a, b, [1], [0]),
    "scaled_dot_product_attention": lambda op, a, b: op(a, b, b),
    "addmm": lambda op, a, b: op(drawn(3).to(a.dtype), a, b),
    "addmv": lambda op, a, b: op(drawn(3).to(a.dtype), a, b),
    "baddbmm": lambda op, a, b: op(drawn(3).to(a.dtype), a, b),
    "addbmm": lambda op, a, b: op(drawn(3).to(a.dtype), a, b),
    "einsum": lambda op, a, b: op("ij,jk->ik", [a, b]),
    "bilinear": lambda op, a, b: op(a, a, b),
    "convolution": lambda op, a, b: op(a, b, None, [1], [0], [1], False, [0], 1),
    "index_put": lambda op, a, b: op(a, [PLACES], b),
    "masked_scatter": lambda op, a, b: op(a, torch.ones(3, 2).bool(), b),
    "index_reduce": lambda op, a, b: op(a, 0, PLACES, b, "mean"),
    "scatter_reduce": lambda op, a, b: op(a, 0, PLACES[:, None].expand(3, 2), b, "sum"),
    **dict.fromkeys(("index_add", "index_copy"), lambda op, a, b: op(a, 0, PLACES, b)),
    **dict.fromkeys(
        ("scatter", "scatter_add"), lambda op, a, b: op(a, 0, PLACES[:, None].expand(3, 2), b)
    ),
}
OPERANDS |= {
    "addmm": OPERANDS["mm"], "einsum": OPERANDS["mm"], "addmv": OPERANDS["mv"],
    "baddbmm": OPERANDS["bmm"], "addbmm": OPERANDS["bmm"], "convolution": OPERANDS["conv1d"],
    "bilinear": ((2, 5), (3, 5, 5)), **dict.fromkeys(WRITES, ((3, 2), (3, 2))),
}  # fmt: skip


def test_what_is_of_one_type_refuses_two() -> None:
    of_one_type = {key for key, basics in BASICS.items() if basics.one_type}
    assert of_one_type <= set(OPERANDS)
    for key, shapes in OPERANDS.items():
        op, call = getattr(torch.ops.aten, key), CALLS.get(key, lambda op, a, b: op(a, b))
        a, b = (drawn(*shape) for shape in shapes)
        call(op, a, b)
        try:
            call(op, a.float(), b)
        except RuntimeError:
            assert key in of_one_type or not OPS[key].product, key
        else:
            assert key not in of_one_type, key


def test_every_product_has_operands_to_try() -> None:
    products = {row.key for row in aten_rows() if row.product or row.attends}
    assert products - {"_grouped_mm"} <= set(OPERANDS)  # that one takes bfloat16 alone


def test_outputs_of_a_weight_are_apart_and_inputs_in_all() -> None:
    """Without one index along an output dim some outputs are others; along an input dim all."""
    for key, shapes in OPERANDS.items():
        named = OPS[key].weights if key in OPS else {}
        places = {} if callable(named) else named
        op, call = getattr(torch.ops.aten, key), CALLS.get(key, lambda op, a, b: op(a, b))
        operands = [drawn(*shape) + 2 for shape in shapes]
        for name, place in places.items():
            at = int(name not in ("self", "mat1", "batch1"))
            out, into = place.dims(operands[at].ndim)
            for dims, every in ((out, False), (into, True)):
                for dim in dims:
                    less = [x.clone() for x in operands]
                    less[at].select(dim, 0).zero_()
                    moved = call(op, *less) != call(op, *operands)
                    assert moved.any() and bool(moved.all()) == every, (key, name, dim)


def test_what_measures_gives_sizes_alone() -> None:
    rows, x = [k for k in ROWS if OPS[k].measures], torch.ones(2, 3)
    assert {len({str(_measured(k, x * n)) for n in (0, 1, torch.nan)}) for k in rows} == {1}


def _measured(key: str, x: Tensor) -> object:
    op = getattr(torch.ops.aten, key)
    return op(x) if "numel" in key else op(x, 1)


def test_what_shares_gives_parts_of_a_whole() -> None:
    x = drawn(3, 5)
    for key in (k for k in ROWS if OPS[k].shares):
        found = nn.functional.softmin(x, -1) if key == "softmin" else _shared(key, x)
        whole = found.exp() if "log" in key else found
        torch.testing.assert_close(whole.sum(-1), torch.ones(3, dtype=x.dtype))


def _shared(key: str, x: Tensor) -> Tensor:
    if key == "logsumexp":  # what is left of each logarithm without that of the whole is its share
        return x - torch.logsumexp(x, -1, keepdim=True)
    more = (False,) if key in ("_softmax", "_log_softmax") else ()
    return getattr(torch.ops.aten, key)(x, -1, *more)


def test_what_attends_has_the_arguments_of_fused_attention() -> None:
    named = {"query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa"}
    assert all(named <= arguments(k) for k in ROWS if OPS[k].attends)


def test_what_reparametrises_has_the_rows_of_v_at_the_lengths_of_g() -> None:
    v, g = drawn(3, 5), drawn(3, 1)
    for key in (k for k in ROWS if OPS[k].reparametrises):
        found = getattr(torch.ops.aten, key)(v, g, 0)
        torch.testing.assert_close(found, g * v / v.square().sum(1, keepdim=True).sqrt())


def test_the_words_of_rule_are_the_fields_of_a_row() -> None:
    own = {f.name for f in fields(Op)} - {"key", "axes"}
    assert set(Facts.__annotations__) == own | {f.name for f in fields(Basics)}
    with pytest.raises(ValueError, match="'wieghts'; a row says weights, parameters, sizes"):
        mk.rule("mylib::op", wieghts={})  # type: ignore[call-arg]


def test_rules_of_a_block_are_forgotten_at_its_end() -> None:
    with rules_kept():
        mk.rule("mylib::forgotten", training="train", one_type=True)(lambda walk, node, args: ())
        assert BASICS["mylib::forgotten"] == Basics("train", one_type=True)
        assert OPS["mylib::forgotten"].training == "train" and OPS["mylib::forgotten"].one_type
        with pytest.raises(ValueError, match="has a rule already"):
            mk.rule("mylib::forgotten")(lambda walk, node, args: ())
    assert "mylib::forgotten" not in OPS and "mylib::forgotten" not in BASICS


@custom_op("tabletest::affine", mutates_args=())
def affine(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """x W + shift, with a weight [in, out]."""
    return x @ weight + shift


@affine.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _affine_backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    flat, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ weight.t(), flat.t() @ out, out.sum(0)


affine.register_autograd(
    _affine_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2])
)


@custom_op("tabletest::spread", mutates_args=())
def spread(x: Tensor, size: int) -> Tensor:
    """The mean of the last dim, at each of `size` places."""
    return x.mean(-1, keepdim=True).expand(*x.shape[:-1], size).clone()


@spread.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def affine_axes(walk: Walk, node: object, args: dict[str, object]) -> object:
    x, weight, shift = (walk.of(args[name]) for name in ("x", "weight", "shift"))
    walk.contract(walk.unify(x[-1], weight[0]))
    walk.weight(args["weight"], 0, 1)
    return *x[:-1], walk.unify(weight[1], shift[0])


class Affine(nn.Module):
    def __init__(self, wide: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, wide)
        self.weight = nn.Parameter(torch.randn(wide, hidden) / wide**0.5)
        self.shift = nn.Parameter(torch.randn(hidden))
        self.back, self.head = nn.Linear(hidden, wide), nn.Linear(wide, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = torch.ops.tabletest.affine(x, self.weight, self.shift)
        return self.head(x + self.back(torch.tanh(y)))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_one_row_nests_a_contraction_of_the_users_own(nesting: str) -> None:
    torch.manual_seed(1)
    model, ids = Affine(8, 12).double().eval(), torch.randint(11, (4, 5))
    expected = model(ids)
    with rules_kept():
        mk.rule(
            torch.ops.tabletest.affine,
            weights={"weight": mk.Weight(out=1, into=0)},
            parameters=("shift",),
        )(affine_axes)
        doll = mk.convert(model, (ids,), sizes=[2, 4, 8], nesting=nesting)
        assert {g.size for g in doll.plan.groups} == {8, 12} and not doll.plan.unknown
        small, report = mk.slice(doll, 4), mk.verify(doll, (ids,))
        assert report.passed, str(report)
        assert [a.kind for a in doll.plan.actions.values()].count("mask") == (
            2 if nesting == "masked" else 0
        )
        if nesting == "sliced":
            assert torch.allclose(doll(ids), expected)
        _is_the_narrow_class(model, small, nesting, ids)
        doll.outputs(ids)[4].sum().backward()
        gradient = model.weight.grad
        assert gradient is not None
        assert not gradient[4:].any() and not gradient[:, 6:].any() and gradient[:4, :6].any()


def _is_the_narrow_class(model: Affine, small: nn.Module, nesting: str, ids: Tensor) -> None:
    """Arithmetic: the class at width 4, hidden 6, over prefixes (masked: with zeros below)."""
    narrow = Affine(4, 6).double()
    state = {
        name: tensor[tuple(slice(0, n) for n in narrow.state_dict()[name].shape)].clone()
        for name, tensor in model.state_dict().items()
    }
    if nesting == "masked":  # units of size 2 (hidden 3) read nothing of the units after them
        state["weight"][2:, :3] = 0
        state["back.weight"][:2, 3:] = 0
    narrow.load_state_dict(state)
    assert torch.allclose(small(ids), narrow(ids), 1e-12, 1e-12)


class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))
        y = self.mix(torch.ops.tabletest.spread(self.up(x), 8) * y)
        return self.head(torch.relu(y))


def spread_axes(walk: Walk, node: object, args: dict[str, object]) -> object:
    x = walk.of(args["x"])
    walk.mix(x[-1])
    return *x[:-1], walk.fresh(8, name="spread")


def test_a_size_of_the_users_own_op_follows_the_width() -> None:
    model, x = Spread().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    with rules_kept():
        mk.rule(torch.ops.tabletest.spread, sizes="size")(spread_axes)
        doll = mk.convert(model, (x,), sizes=[4, 8], nesting="sliced")
        small = mk.slice(doll, 4)
        assert small.up.weight.shape == (4, 3)
        h = nn.functional.linear(x, model.up.weight[:4], model.up.bias[:4])
        y = h.mean(-1, keepdim=True) * torch.tanh(h)
        y = torch.relu(nn.functional.linear(y, model.mix.weight[:4, :4], model.mix.bias[:4]))
        expected = nn.functional.linear(y, model.head.weight[:, :4], model.head.bias)
        assert torch.allclose(small(x), expected, 1e-12, 1e-12)


def test_weight_places_by_rank() -> None:
    assert Weight(-1, -2).dims(3) == ((2,), (1,))
    assert Weight(0, (1, 2)).dims(3) == ((0,), (1, 2))
    assert Weight().dims(1) == ((), (0,))


def test_python_arithmetic_has_no_row() -> None:
    from torch import fx

    graph = fx.Graph()
    node = graph.call_function(operator.mul, (graph.placeholder("n"), 2))
    assert op_of(node).axes is None and not op_of(node).scaling


class Recurrent(nn.Module):
    """Two layers in both directions, between two projections."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(16, 5)
        self.cell = kind(8, 8, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.cell(self.before(x))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_a_recurrent_layer_gets_its_cut_weights_in_one_block(
    kind: type[nn.RNNBase], nesting: str
) -> None:
    """CuDNN takes no others; a CPU would not tell."""
    seen: list[bool] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if str(func).startswith(("aten.lstm", "aten.gru", "aten.rnn")):
                states = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
                seen.extend(x.is_contiguous() for x in (*states, *args[2]))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 5, 6)
    model = Recurrent(kind)
    doll = mk.convert(model, (x,), sizes=[4, 8], nesting=nesting)
    with Watch():
        outputs = doll.eval().outputs(x)
        assert all(outputs[size] is not None for size in doll.sizes)
    assert seen and all(seen)
