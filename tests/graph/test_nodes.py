"""An op has one key: bare for ATen's, with its namespace for any other."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx, nn
from torch.library import custom_op

import matryoshkafy as mk
from matryoshkafy.graph.nodes import info_of, is_item, is_tensor, op_key, outputs_of, set_info


@custom_op("oneop::linear", mutates_args=())
def doubled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Not what aten::linear computes."""
    return 2 * x @ weight.t() + bias


@doubled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@custom_op("oneop::dropout", mutates_args=())
def kept_dropout(x: Tensor) -> Tensor:
    """Has neither `p` nor `train`."""
    return x * 0.5


@kept_dropout.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_the_key_of_an_op() -> None:
    graph = fx.Graph()
    x = graph.placeholder("linear")
    node = graph.call_function(torch.ops.aten.relu.default, (x,))
    assert op_key(node) == op_key(torch.ops.aten.relu) == op_key("aten::relu") == "relu"
    assert op_key(torch.ops.oneop.linear.default) == op_key(torch.ops.oneop.linear)
    assert op_key(torch.ops.oneop.linear) == "oneop::linear"
    assert op_key(x) == ""
    assert op_key(operator.mul) == "operator::mul" != op_key(torch.ops.aten.mul.Tensor)
    assert op_key(math.sqrt) == "math::sqrt"
    assert is_item(graph.call_function(operator.getitem, (node, 0)))


def test_what_a_node_gives() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output([x, 3])
    assert not is_tensor(x) and info_of(x) is None
    set_info(x, info_of(torch.zeros(2, 3)))
    assert is_tensor(x) and outputs_of(graph) == [x, 3]


class Namesakes(nn.Module):
    """Uses ops of another library that have names of ATen's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.oneop.dropout(self.inner(x))
        return torch.ops.oneop.linear(torch.tanh(y), self.out.weight, self.out.bias)


def test_a_namesake_is_never_taken_for_atens() -> None:
    model, x = Namesakes().eval(), torch.randn(3, 4)
    expected = model(x)
    for nesting in ("masked", "sliced"):
        try:
            doll = mk.convert(model, (x,), sizes=[0.5, 1.0], nesting=nesting)
        except mk.MatryoshkafyError as refusal:
            assert "oneop::" in str(refusal)
        else:
            assert torch.equal(doll(x), expected)
