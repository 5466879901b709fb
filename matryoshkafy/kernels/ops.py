"""The operators `torch.ops.matryoshkafy.*`: importing this module registers them.

    linear       y = x W^T + b with a block-triangular W
    conv         aten.convolution with a block-triangular weight
    mask         the weight with its structural zeros written out, for every other contraction
    layer_norm, rms_norm, group_norm    with the statistics of each unit's level or prefix of levels
    level_reduce a reduction over a nested dim that keeps the dim

`runs` are [length, level, length, level, ...] along a dim. weight[o, i] is structurally zero where
level(o) < level(i): its storage is never read into a result and its gradient is zero. The
backward of linear, conv and the norms is an operator too, with no derivative of its own.
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.kernels import convolution
from matryoshkafy.kernels import linear as triangular
from matryoshkafy.kernels.convolution import Geometry
from matryoshkafy.kernels.cross_entropy_ops import (
    nested_cross_entropy,
    nested_cross_entropy_backward,
    nested_cross_entropy_grads,
    nested_cross_entropy_grads_shape,
    nested_cross_entropy_setup,
    nested_cross_entropy_shape,
)
from matryoshkafy.kernels.dispatch import ArgsContext, Context, DoubleBackward, Grads, is_plain
from matryoshkafy.kernels.levels import check_runs, keep_mask
from matryoshkafy.kernels.linear import as_rows
from matryoshkafy.kernels.norm_ops import (
    group_norm,
    layer_norm,
    norm,
    norm_autograd,
    norm_backward,
    norm_backward_shape,
    norm_setup,
    norm_shape,
    rms_norm,
)
from matryoshkafy.kernels.reductions import level_reduce

if TYPE_CHECKING:
    from typing_extensions import Unpack

Ints = list[int]
# As the schemas have them: stride, padding, dilation, transposed, output_padding, groups, runs.
ConvCall = tuple[Ints, Ints, Ints, bool, Ints, int, Ints, Ints]
LinearInputs = tuple[Tensor, Tensor, Tensor | None, Ints, Ints]
Impl = Callable[..., Tensor] | Callable[..., tuple[Tensor, ...]]

NAMESPACE = "matryoshkafy"
library: Any = torch.library  # torch leaves its functions without types
LIBRARY = library.Library(NAMESPACE, "DEF")

CONV = (
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
)
RUNS = "int[] out_runs, int[] in_runs"
NORM = "float eps, int[] runs, bool prefix"
PROBLEM = "Tensor hidden, Tensor table, Tensor? bias, Tensor target"
OPTIONS = "int[] widths, float[] weights, int ignore_index, float smoothing"

SCHEMAS = (
    f"linear(Tensor x, Tensor weight, Tensor? bias, {RUNS}) -> Tensor",
    f"linear_opaque(Tensor x, Tensor weight, Tensor? bias, {RUNS}) -> Tensor",
    f"linear_grad_input(Tensor dy, Tensor weight, {RUNS}) -> Tensor",
    f"linear_grad_weight(Tensor dy, Tensor x, Tensor weight, {RUNS}) -> Tensor",
    f"conv(Tensor x, Tensor weight, Tensor? bias, {CONV}, {RUNS}) -> Tensor",
    f"conv_grad_input(Tensor dy, Tensor x, Tensor weight, {CONV}, {RUNS}) -> Tensor",
    f"conv_grad_weight(Tensor dy, Tensor x, Tensor weight, {CONV}, {RUNS}) -> Tensor",
    f"mask(Tensor weight, int dim_out, int dim_in, {RUNS}) -> Tensor",
    f"layer_norm(Tensor x, Tensor? weight, Tensor? bias, {NORM}) -> Tensor",
    f"rms_norm(Tensor x, Tensor? weight, {NORM}) -> Tensor",
    f"group_norm(Tensor x, Tensor? weight, Tensor? bias, {NORM}) -> Tensor",
    f"norm(Tensor x, Tensor? weight, Tensor? bias, {NORM}, bool centred)"
    " -> (Tensor, Tensor, Tensor)",
    "norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int[] runs,"
    " bool prefix, bool centred) -> (Tensor, Tensor, Tensor)",
    f"nested_cross_entropy({PROBLEM}, {OPTIONS}, str reduction, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"nested_cross_entropy_grads({PROBLEM}, {OPTIONS}, Tensor scale, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    "level_reduce(Tensor x, int[] dims, int dim, int[] runs, str kind, bool prefix) -> Tensor",
)


def define(name: str, kernel: Impl, fake: Impl) -> None:
    """Gives an operator its kernel on every device and its shape function."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def refuse_double_backward(name: str) -> None:
    """Makes the derivative of a backward operator an error."""

    def backward(ctx: Context, *grads: Tensor) -> None:
        raise DoubleBackward(name)

    library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=LIBRARY)


def cast(value: object, dtype: torch.dtype) -> object:
    """The tensor in the dtype, if autocast would touch it."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def _autocast(name: str, device: str, dtype: torch.dtype | None) -> None:
    """Under autocast, casts the operator's tensors to dtype (None: the one autocast was given)."""
    key = f"Autocast{device.upper()}"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    op = getattr(torch.ops.matryoshkafy, name).default

    def kernel(*args: object) -> Any:
        to = dtype or torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*[cast(arg, to) for arg in args])

    LIBRARY.impl(name, kernel, key)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    if not is_plain(x):
        return torch.ops.matryoshkafy.linear_opaque(x, weight, bias, out_runs, in_runs)
    check_linear(x, weight, out_runs, in_runs)
    return triangular.product(x, weight, bias, tuple(out_runs), tuple(in_runs))


def check_linear(x: Tensor, weight: Tensor, out_runs: list[int], in_runs: list[int]) -> None:
    """Raises an error that names the shapes unless they and the runs fit."""
    check_runs(out_runs, weight.shape[0], "the weight's dim 0")
    check_runs(in_runs, weight.shape[1], "the weight's dim 1")
    if x.shape[-1] != weight.shape[1]:
        raise MatryoshkafyError(
            f"x {list(x.shape)} ends in {x.shape[-1]} units but the weight "
            f"{list(weight.shape)} reads {weight.shape[1]}; give [..., {weight.shape[1]}]"
        )


def linear_opaque(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    check_linear(x, weight, out_runs, in_runs)
    y = triangular.forward(as_rows(x), weight, bias, tuple(out_runs), tuple(in_runs))
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    check_linear(x, weight, out_runs, in_runs)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_grad_input(
    dy: Tensor, weight: Tensor, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    dx = triangular.grad_input(as_rows(dy), weight, tuple(out_runs), tuple(in_runs))
    return dx.view(*dy.shape[:-1], weight.shape[1])


def linear_grad_input_shape(
    dy: Tensor, weight: Tensor, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


def linear_grad_weight(
    dy: Tensor, x: Tensor, weight: Tensor, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    return triangular.grad_weight(as_rows(dy), as_rows(x), weight, tuple(out_runs), tuple(in_runs))


def linear_grad_weight_shape(
    dy: Tensor, x: Tensor, weight: Tensor, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    return torch.empty_like(weight)


class LinearContext(Context, Protocol):
    """What the product keeps."""

    out_runs: Ints
    in_runs: Ints


def linear_setup(ctx: LinearContext, inputs: LinearInputs, output: Tensor) -> None:
    x, weight, _, ctx.out_runs, ctx.in_runs = inputs
    needs_weight = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if needs_weight else None, weight)


def linear_backward(ctx: LinearContext, dy: Tensor) -> Grads:
    ops, (x, weight) = torch.ops.matryoshkafy, ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    runs = (ctx.out_runs, ctx.in_runs)
    dx = ops.linear_grad_input(dy, weight, *runs) if needs_x else None
    dw = ops.linear_grad_weight(dy, x, weight, *runs) if needs_weight else None
    db = as_rows(dy).sum(0) if needs_bias else None
    return dx, dw, db, None, None


def geometry_of(args: ConvCall) -> Geometry:
    """The geometry from a conv's flat arguments."""
    stride, padding, dilation, transposed, output_padding, groups, out_runs, in_runs = args
    return Geometry(
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        transposed,
        tuple(output_padding),
        groups,
        tuple(out_runs),
        tuple(in_runs),
    )


def check_conv(weight: Tensor, geometry: Geometry) -> None:
    """Raises RunsError unless the runs fit the channels within a group."""
    runs = (geometry.out_runs, geometry.in_runs)
    first, second = reversed(runs) if geometry.transposed else runs
    check_runs(first, weight.shape[0] // geometry.groups, "the weight's dim 0 (within a group)")
    check_runs(second, weight.shape[1], "the weight's dim 1")


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Unpack[ConvCall]) -> Tensor:
    geometry = geometry_of(args)
    check_conv(weight, geometry)
    return convolution.forward(x, weight, bias, geometry).contiguous()


def conv_shape(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Unpack[ConvCall]) -> Tensor:
    check_conv(weight, geometry_of(args))
    return torch.convolution(x, weight, bias, *args[:-2]).contiguous()


def conv_grad_input(dy: Tensor, x: Tensor, weight: Tensor, *args: Unpack[ConvCall]) -> Tensor:
    return convolution.grad_input(dy, x, weight, geometry_of(args)).contiguous()


def conv_grad_input_shape(dy: Tensor, x: Tensor, weight: Tensor, *args: Unpack[ConvCall]) -> Tensor:
    return x.new_empty(x.shape)


def conv_grad_weight(dy: Tensor, x: Tensor, weight: Tensor, *args: Unpack[ConvCall]) -> Tensor:
    return convolution.grad_weight(dy, x, weight, geometry_of(args)).contiguous()


def conv_grad_weight_shape(
    dy: Tensor, x: Tensor, weight: Tensor, *args: Unpack[ConvCall]
) -> Tensor:
    return weight.new_empty(weight.shape)


def conv_setup(ctx: ArgsContext, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.args = inputs
    ctx.save_for_backward(x, weight)


def conv_backward(ctx: ArgsContext, dy: Tensor) -> Grads:
    ops, (x, weight) = torch.ops.matryoshkafy, ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx = ops.conv_grad_input(dy, x, weight, *ctx.args) if needs_x else None
    dw = ops.conv_grad_weight(dy, x, weight, *ctx.args) if needs_weight else None
    db = dy.sum([0, *range(2, dy.ndim)]) if needs_bias else None
    return dx, dw, db, *[None] * len(ctx.args)


def _mask(
    weight: Tensor, dim_out: int, dim_in: int, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    mask_shape(weight, dim_out, dim_in, out_runs, in_runs)
    dim_out, dim_in = dim_out % weight.ndim, dim_in % weight.ndim
    keep = keep_mask(tuple(out_runs), tuple(in_runs), weight.device)
    keep = keep if dim_out < dim_in else keep.t()
    shape = [n if d in (dim_out, dim_in) else 1 for d, n in enumerate(weight.shape)]
    out = torch.empty_like(weight)
    return torch.where(keep.view(shape), weight, weight.new_zeros(()), out=out)


def mask_shape(
    weight: Tensor, dim_out: int, dim_in: int, out_runs: list[int], in_runs: list[int]
) -> Tensor:
    check_runs(out_runs, weight.shape[dim_out], f"the weight's dim {dim_out}")
    check_runs(in_runs, weight.shape[dim_in], f"the weight's dim {dim_in}")
    return torch.empty_like(weight)


def mask_setup(ctx: ArgsContext, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.args = inputs


def mask_backward(ctx: ArgsContext, dy: Tensor) -> Grads:
    return torch.ops.matryoshkafy.mask(dy, *ctx.args), None, None, None, None


for schema in SCHEMAS:
    LIBRARY.define(schema)

define("linear_opaque", linear_opaque, linear_shape)
define("linear_grad_input", linear_grad_input, linear_grad_input_shape)
define("linear_grad_weight", linear_grad_weight, linear_grad_weight_shape)
define("conv", conv, conv_shape)
define("conv_grad_input", conv_grad_input, conv_grad_input_shape)
define("conv_grad_weight", conv_grad_weight, conv_grad_weight_shape)
define("mask", _mask, mask_shape)
define("norm", norm, norm_shape)
define("norm_backward", norm_backward, norm_backward_shape)
define("nested_cross_entropy", nested_cross_entropy, nested_cross_entropy_shape)
define("nested_cross_entropy_grads", nested_cross_entropy_grads, nested_cross_entropy_grads_shape)

# Compositions of other operators: autograd, autocast and shapes come from their parts.
LIBRARY.impl("linear", _linear, "CompositeImplicitAutograd")
LIBRARY.impl("layer_norm", layer_norm, "CompositeImplicitAutograd")
LIBRARY.impl("rms_norm", rms_norm, "CompositeImplicitAutograd")
LIBRARY.impl("group_norm", group_norm, "CompositeImplicitAutograd")
LIBRARY.impl("level_reduce", level_reduce, "CompositeImplicitAutograd")

for name, setup, backward in (
    ("linear_opaque", linear_setup, linear_backward),
    ("conv", conv_setup, conv_backward),
    ("mask", mask_setup, mask_backward),
    ("norm", norm_setup, norm_autograd),
    ("nested_cross_entropy", nested_cross_entropy_setup, nested_cross_entropy_backward),
):
    library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=LIBRARY)

for name in (
    "linear_grad_input",
    "linear_grad_weight",
    "conv_grad_input",
    "conv_grad_weight",
    "norm_backward",
    "nested_cross_entropy_grads",
):
    refuse_double_backward(name)

for device in ("cpu", "cuda"):
    _autocast("linear", device, None)
    _autocast("conv", device, None)
_autocast("norm", "cuda", torch.float32)
