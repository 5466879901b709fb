"""What is computed once per size inside the trunk, and how its sizes meet a width again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from matryoshkafy.axes import dims
from matryoshkafy.graph.nodes import bound_args
from matryoshkafy.plan.plan import Action
from matryoshkafy.rewrite.writer import Rewriter
from matryoshkafy.rules import op_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """Units start to stop along a dim of the node, which belong to a level."""

    dim: int
    start: int
    stop: int
    level: int


def write_blocks(writer: Rewriter, node: fx.Node, level: int, action: Action) -> fx.Node:
    """Compute each level's units from what that level has, and lay them one after the other."""
    del action
    shape = writer.plan.dims(node.name)
    dim = next(d for d, axis in enumerate(shape) if dims.is_nested(axis))
    spans = dims.spans(shape[dim], writer.plan.ladder[: level + 1])
    parts = [_block(writer, node, level, Block(dim, *span)) for span in spans]
    if len(parts) == 1:
        return parts[0]
    return writer.graph.call_function(aten.cat.default, (parts, dim))


def _block(writer: Rewriter, node: fx.Node, level: int, block: Block) -> fx.Node:
    rank = len(writer.plan.dims(node.name))

    def narrowed(value: fx.Node) -> Any:
        at = _aligned(node, value, block.dim - rank)
        shape = writer.plan.dims(value.name)
        if at is None or len(shape) < -at or not dims.is_nested(shape[at]):
            return writer.written[writer.key(value, block.level)]
        new = writer.written[writer.key(value, level)]
        whole = block.stop - block.start == dims.size_at(shape[at], writer.plan.ladder[level])
        segments = ((block.start, block.stop),)
        return new if whole else writer.cut_dim(new, len(shape) + at, segments)

    args, kwargs = fx.map_arg((node.args, node.kwargs), narrowed)
    return writer.call(node, node.target, args, kwargs)


def _lettered(equation: str, operands: Sequence[object], value: fx.Node, dim: int) -> int | None:
    """The same for einsum "ab,bc->ac": the dim of the operand that has the output's letter."""
    terms, _, out = equation.replace(" ", "").partition("->")
    term = terms.split(",")[list(operands).index(value)]
    place = term.find(out[dim])
    return place - len(term) if place >= 0 else None


def _aligned(node: fx.Node, value: fx.Node, dim: int) -> int | None:
    """Return which dim of an operand (from the right) is a dim of the output; None: none is."""
    row = op_of(node)
    if not (row.attends or row.product):
        return dim
    given = bound_args(node)
    if row.attends:  # queries and keys are summed over; the values keep their width
        return dim if value is given["value"] else None
    if "equation" in given:
        return _lettered(given["equation"], given["tensors"], value, dim)
    left, right = [v for v in given.values() if isinstance(v, fx.Node)][-2:]
    mine = value is (right if dim == -1 else left)
    return dim if mine or value not in (left, right) else None
