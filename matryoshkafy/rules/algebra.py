"""What each op does to the units of an axis seen as a vector: one word a row, for rotating and
for reading a model's last product.

    zero       every unit is nothing                  zeros
    uniform    every unit is one number               ones, full
    same       the value itself                       clone, to
    like       of the type or the shape of another    type_as, view_as
    turn       the last two dims change places        t
    spread     one unit becomes many alike            expand
    carry      other dims are acted on                reshape, dropout, a sum over another dim
    attend     queries meet keys, values are mixed    scaled_dot_product_attention
    write      values are put in along other dims     pad, where, scatter_add
    add, subtract, multiply, divide, power            of two values, unit by unit
    length     the Euclidean length                   linalg_vector_norm
    bound      limits that nothing usual reaches      clamp_min
"""

from __future__ import annotations

from collections.abc import Mapping

from matryoshkafy.rules.table import OPS, also

WORDS: Mapping[str, str] = {
    "zero": "zeros zeros_like new_zeros",
    "uniform": "ones full empty scalar_tensor ones_like full_like new_ones new_full",
    "same": "to _to_copy clone contiguous detach alias",
    "turn": "t numpy_T transpose",
    "like": "type_as view_as reshape_as",
    "spread": "expand expand_as broadcast_to",
    "carry": """dropout native_dropout feature_dropout view reshape permute unsqueeze squeeze select
        slice index index_select gather cat stack flatten unflatten movedim narrow embedding
        neg split split_with_sizes chunk unbind repeat sum mean repeat_interleave roll flip
        tile swapaxes moveaxis mT avg_pool1d avg_pool2d adaptive_avg_pool1d
        adaptive_avg_pool2d avg_pool3d adaptive_avg_pool3d upsample_nearest1d
        upsample_nearest2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
    "write": """pad constant_pad_nd masked_fill where masked_scatter scatter scatter_add index_add
        index_put index_copy slice_scatter select_scatter""",
    "attend": "scaled_dot_product_attention",
    "add": "add",
    "subtract": "sub rsub",
    "multiply": "mul",
    "divide": "div",
    "power": "pow square",
    "length": "linalg_vector_norm norm",
    "bound": "clamp clamp_min",
}

for word, ops in WORDS.items():
    also([op for op in ops.split() if op in OPS], algebra=word)

# The argument whose dim is summed over, beside a weight; of a convolution it comes after the batch.
also(["linear"], reads=("input", -1))
also(["matmul", "mm", "bmm"], reads=("self", -1))
also(["addmm"], reads=("mat1", -1))
also(["conv1d"], reads=("input", -2))
also(["conv2d", "convolution"], reads=("input", -3))
also(["conv3d"], reads=("input", -4))
