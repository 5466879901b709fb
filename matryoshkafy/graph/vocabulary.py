"""What a graph must know of an op before there are rules; its row and `mk.rule` say the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Basics:
    """What is known of an op while its graph is made.

    Attributes:
        training: the argument that follows `self.training`, "" where there is none.
        one_type: whether operands of two floating types are an error: all other ops promote.
    """

    training: str = ""
    one_type: bool = False


_PRODUCTS = """matmul mm bmm mv dot vdot addmm baddbmm addbmm addmv einsum tensordot linear bilinear
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    scaled_dot_product_attention"""
WRITES = frozenset(
    """index_add index_copy index_put index_reduce masked_scatter scatter scatter_add
    scatter_reduce""".split()
)
BASICS: dict[str, Basics] = {
    **dict.fromkeys((*_PRODUCTS.split(), *WRITES), Basics(one_type=True)),
    **dict.fromkeys("dropout feature_dropout alpha_dropout".split(), Basics("train")),
    **dict.fromkeys("feature_alpha_dropout lstm gru rnn_tanh rnn_relu".split(), Basics("train")),
    **dict.fromkeys(("batch_norm", "rrelu"), Basics("training")),
}
NOTHING = Basics()


def basics_of(key: str) -> Basics:
    """Return what is known of an op by its key."""
    return BASICS.get(key, NOTHING)
