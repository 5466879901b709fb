"""operators.py: what a saved graph may call, and that the library saves what it writes itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.files.operators import CHECKED, NEEDED, why_not
from matryoshkafy.rules import OPS

TRUSTING = (
    *("_embedding_bag_dense_backward", "embedding_dense_backward", "_segment_reduce_backward"),
    *("max_pool2d_with_indices_backward", "_thnn_fused_lstm_cell", "_unsafe_masked_index"),
    *("_transform_bias_rescale_qkv", "_reshape_alias", "_resize_output_", "resize_", "set_"),
    *("from_file", "save", "_print"),
)


def overloads(name):
    packet = getattr(torch.ops.aten, name)
    return [getattr(packet, overload) for overload in packet.overloads()]


@pytest.mark.parametrize("name", TRUSTING)
def test_what_trusts_its_arguments_or_touches_files_is_refused(name):
    assert all(map(why_not, overloads(name)))


@pytest.mark.parametrize("name", ["add", "mul", "cat", "index_select"])
def test_overloads_that_write_into_another_tensor_are_refused(name):
    assert all(why_not(op) for op in overloads(name) if op._overloadname.endswith("out"))


def test_the_lists_hold_what_they_say():
    private = {n for n in CHECKED if n.startswith("_") or "backward" in n or "unsafe" in n}
    assert not private
    assert not CHECKED & NEEDED
    # An op with a row of the library's own may be called by it, and stands in no list besides.
    rows = {k for k, op in OPS.items() if op.axes and op.axes.__module__.startswith("matryoshkafy")}
    assert not CHECKED & rows


class Diagonal(nn.Module):
    """Writes a diagonal, and a deviation that keeps its dim."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        """x [N, 6] -> [N, 3]."""
        h = torch.relu(self.inner(x))
        h = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-3)
        square = (x[:, :, None] * x[:, None, :]).clone()
        square.diagonal(dim1=1, dim2=2).fill_(0.0)
        return self.out(h) + square.sum((1, 2))[:, None]


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_what_the_library_writes_can_be_saved(tmp_path, nesting):
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    doll = mk.convert(Diagonal().eval(), (x,), sizes=[2, 4, 8], nesting=nesting)
    mk.save(doll, tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(mk.load(tmp_path / "c")(x), doll(x))
        torch.testing.assert_close(mk.load(tmp_path / "c", size=4)(x), doll.outputs(x)[4])
