"""What a saved graph may call: the operators with a rule, and a few more that real models need.

Many operators of torch trust their arguments: an index out of bounds reads or writes past the end
of memory. A graph out of a file may call those that are known, and no private, backward or unsafe
one beyond `NEEDED`.
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.json_text import shown
from matryoshkafy.graph.nodes import op_key, schema_of
from matryoshkafy.rules import OPS

NAMESPACES = ("aten", "matryoshkafy", "prims", "torchvision")
# What must be imported for a namespace of a well known library to exist.
KNOWN: Mapping[str, str] = {"transformers": "transformers.integrations.moe"}
# torch's own namespaces with operators that do more than compute: never out of a file.
REFUSED = {
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_native", "_native_aot",
    "_quantized", "_test", "c10d", "coor", "cuda", "debug_mode_ops", "debugprims", "export",
    "flex_gemm", "fsdp", "higher_order", "inductor", "inductor_prims", "mkl", "mkldnn",
    "mkldnn_prepacked", "onednn", "prepacked", "profiler", "quantization", "quantized", "rngprims",
    "sparse", "static_runtime", "streams", "symm_mem", "tensorexpr", "triton", "vulkan_prepack",
    "xnnpack",
}  # fmt: skip
# Private, backward and unsafe operators that traced models call; torch checks their arguments.
NEEDED = frozenset({
    "__and__", "__ixor__", "__lshift__", "__or__", "__rshift__", "__xor__", "_adaptive_avg_pool1d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_async", "_assert_scalar",
    "_assert_tensor_metadata", "_cdist_forward", "_conj", "_fused_rms_norm", "_grouped_mm",
    "_local_scalar_dense", "_log_softmax", "_pack_padded_sequence", "_pad_packed_sequence",
    "_prelu_kernel", "_safe_softmax", "_softmax", "_sparse_mm", "_to_copy", "_unique2",
    "_unsafe_index", "_unsafe_index_put", "_unsafe_view", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "_weight_norm", "_weight_norm_interface", "elu_backward",
    "gelu_backward", "hardtanh_backward", "leaky_relu_backward", "mish_backward",
    "sigmoid_backward", "silu_backward", "softplus_backward", "tanh_backward", "threshold_backward",
    "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "upsample_nearest2d_backward",
})  # fmt: skip
# Public operators without a rule whose arguments torch checks: they hold what they touch whole.
CHECKED = frozenset({
    "affine_grid_generator", "allclose", "as_strided_scatter", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "binomial", "block_diag", "cartesian_prod", "cholesky",
    "cholesky_inverse", "cholesky_solve", "combinations", "corrcoef", "cov", "cross",
    "cross_entropy_loss", "deform_conv2d", "det", "diag", "diag_embed", "diagflat", "diagonal_copy",
    "diagonal_scatter", "dist", "dstack", "empty", "empty_like", "equal", "erfcx", "expand_copy",
    "fft_fftfreq", "fft_rfftfreq", "fliplr", "flipud", "frobenius_norm", "gcd", "huber_loss",
    "igamma", "igammac", "inner", "inverse", "isclose", "isneginf", "isposinf", "isreal", "item",
    "kaiser_window", "kl_div", "l1_loss", "lcm", "ldexp", "lift", "linalg_cholesky",
    "linalg_cholesky_ex", "linalg_cond", "linalg_cross", "linalg_det", "linalg_diagonal",
    "linalg_eigh", "linalg_eigvalsh", "linalg_householder_product", "linalg_inv", "linalg_inv_ex",
    "linalg_lstsq", "linalg_lu", "linalg_matmul", "linalg_matrix_exp", "linalg_matrix_norm",
    "linalg_matrix_power", "linalg_matrix_rank", "linalg_multi_dot", "linalg_norm", "linalg_pinv",
    "linalg_qr", "linalg_slogdet", "linalg_solve", "linalg_solve_ex", "linalg_solve_triangular",
    "linalg_svd", "linalg_svdvals", "linalg_vander", "logdet", "lu_solve", "margin_ranking_loss",
    "matrix_exp", "matrix_power", "mse_loss", "multinomial", "mvlgamma", "nanquantile",
    "narrow_copy", "new_empty", "nextafter", "nll_loss", "nll_loss2d", "nll_loss_nd", "nms",
    "nonzero_numpy", "nonzero_static", "normal", "nuclear_norm", "orgqr", "path", "path_size",
    "pdist", "permute_copy", "pinverse", "put", "qr", "quantile", "randint_like", "rot90",
    "select_copy", "signbit", "slice_copy", "slogdet", "smooth_l1_loss", "special_bessel_j0",
    "special_bessel_j1", "special_entr", "special_erfcx", "special_expit", "special_i0",
    "special_i0e", "special_i1", "special_i1e", "special_log_ndtr", "special_log_softmax",
    "special_logit", "special_ndtr", "special_ndtri", "special_softmax", "special_xlog1py",
    "special_zeta", "squeeze_copy", "svd", "sym_constrain_range", "sym_constrain_range_for_size",
    "sym_is_contiguous", "sym_storage_offset", "sym_stride", "t_copy", "trace", "transpose_copy",
    "trapezoid", "trapz", "triangular_solve", "triplet_margin_loss", "unfold_copy",
    "unique_consecutive", "unsqueeze_copy", "vander", "view_as_complex_copy", "view_as_real_copy",
})  # fmt: skip


class OperatorError(MatryoshkafyError):
    """A saved graph calls operators of a library that is not there or not trusted."""


def why_not(op: torch._ops.OpOverload, own: Iterable[str] = ()) -> str:
    """Return why a saved graph may not call an operator; "" where it may.

    own: namespaces of libraries that the reader of the file allows, and answers for.
    """
    schema = schema_of(op)
    # aten.save pickles into a file and aten.from_file maps one; operators without a kernel belong
    # to TorchScript's interpreter (set_grad_enabled, warn, surgery on lists).
    files = any(argument.name == "filename" for argument in schema.arguments)
    if files or not torch._C._dispatch_has_kernel(op.name()) or op.name() == "aten::_print":
        return "does more than compute"
    if op.namespace in own and op.namespace not in NAMESPACES:
        return ""
    name = schema.name.partition("::")[2]
    hidden = name.startswith("_") or "backward" in name or "unsafe" in name
    if any(argument.is_out for argument in schema.arguments) or (hidden and name not in NEEDED):
        return "is private to torch or trusts its arguments"
    if name in NEEDED or name in CHECKED or op_key(op) in OPS:
        return ""
    return "has no rule and is not among the known; with a rule of yours (matryoshkafy.rule) it may"


def namespaces_of(graph: fx.Graph) -> tuple[str, ...]:
    """Return the namespaces of the operators that a graph calls, without those always allowed."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    names = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
    return tuple(sorted(names - set(NAMESPACES)))


def allowed(names: Iterable[object], what: str) -> tuple[str, ...]:
    """Return the namespaces that a checkpoint names, where each is registered in this process.

    what: how an error calls the checkpoint. Raises OperatorError for the others. Nothing is
    imported by a name that the file chose, except the known libraries.
    """
    return tuple(_allowed(name, what) for name in names)


def _allowed(name: object, what: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name in REFUSED:
        raise OperatorError(
            f"{what} calls operators of {shown(name)}, which a saved graph may not call. Save the "
            "model again from a source that you trust."
        )
    if name in KNOWN and importlib.util.find_spec(KNOWN[name].partition(".")[0]):
        importlib.import_module(KNOWN[name])
    if not _registered(name):
        library = f"install {name}" if name in KNOWN else "import the module that registers them"
        raise OperatorError(
            f"{what} calls operators of torch.ops.{name}, which is not registered in this process: "
            f"{library} before loading (on the command line: --import MODULE)."
        )
    return name


def _registered(name: str) -> bool:
    return any(op.startswith(f"{name}::") for op in torch._C._dispatch_get_all_op_names())
