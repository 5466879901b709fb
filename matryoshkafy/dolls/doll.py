"""Doll: the converted model. A module that computes as the user's does, at full size or at every
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from matryoshkafy.axes import dims
from matryoshkafy.graph.trace import Trace
from matryoshkafy.outputs import Outputs, Readout
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.graphs import full_graph, outputs_graph, readout_graph, readout_node

Function = Callable[..., Any]


def compiled(graph: fx.Graph) -> Function:
    """Return the function that torch.fx generates for a graph; its first argument holds the
    state.
    """
    code = graph.python_code("self")
    return _forward_from_src(code.src, code.globals)


class Doll(nn.Module):
    """A matryoshka model: every prefix of its widths is a model of its own.

    Call it as the user's model, at full size; `outputs` gives every size. It holds the user's own
    parameters under their own names, so optimizers and checkpoints of the user's keep working.

    Attributes: `sizes` (list of int, ascending), `plan` (`Plan`).
    """

    def __init__(self, trace: Trace, plan: Plan) -> None:
        super().__init__()
        root = trace.root
        # The graph reads names off `_root`, where no method of ours can hide a user's module.
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = root.__dict__[table]
        self.__dict__["_root"] = root
        self._trace, self._plan = trace, plan
        self._functions: dict[Any, Any] = {}
        self._forward = compiled(full_graph(trace, plan))
        self.train(root.training)

    @property
    def sizes(self) -> list[int]:
        """The sizes of the ladder, ascending; the last is the model's width."""
        return list(self._plan.sizes)

    @property
    def plan(self) -> Plan:
        """The frozen analysis that this model was built from."""
        return self._plan

    def train(self, mode: bool = True) -> Doll:
        """Switch dropout and batch norm, as in any module."""
        super().train(mode)
        self.__dict__["_root"].training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the user's model at full size: same arguments, same output structure."""
        return self._forward(self.__dict__["_root"], *args, **kwargs)

    def outputs(self, *args: Any, **kwargs: Any) -> Outputs:
        """Return {size: output} for every size; each output has the structure of the user's.

        Masked nesting: one pass over the trunk, the tail once per size. Sliced nesting: one pass
        per
        size, over live slices of the shared parameters. A tail that is one linear, and each pass of
        sliced nesting, is computed when its size is first read.
        """
        if not self._plan.masked:
            return Outputs({s: self._sliced(i, args, kwargs) for i, s in enumerate(self.sizes)})
        readout = self._readout(args, kwargs)
        if readout is not None:
            return Outputs({s: self._read(readout, s) for s in self.sizes}, readout)
        return self._every_size(args, kwargs)

    def _function(self, key: Any, build: Callable[[], fx.Graph | None]) -> Function | None:
        if key not in self._functions:
            graph = build()
            self._functions[key] = None if graph is None else compiled(graph)
        return self._functions[key]

    def _sliced(self, level: int, args: Any, kwargs: Any) -> Callable[[], Any]:
        function = self._function(level, lambda: _live_graph(self._trace, self._plan, level))
        assert function is not None
        return lambda: function(self.__dict__["_root"], *args, **kwargs)

    def _readout(self, args: Any, kwargs: Any) -> Readout | None:
        function = self._function("readout", lambda: readout_graph(self._trace, self._plan))
        if function is None:
            return None
        hidden, table, bias = function(self.__dict__["_root"], *args, **kwargs)
        node = readout_node(self._trace, self._plan)
        assert node is not None
        inner = self._plan.nodes[node.args[0].name][-1]  # type: ignore[union-attr]
        widths = {
            s: dims.size_at(inner, w) for s, w in zip(self.sizes, self._plan.ladder, strict=True)
        }
        turned = node.target._schema.name != "aten::linear"  # type: ignore[union-attr]
        return Readout(hidden, table.t() if turned else table, bias, widths)

    def _read(self, readout: Readout, size: int) -> Callable[[], Any]:
        width = readout.widths[size]

        def compute() -> Any:
            hidden, table = readout.hidden[..., :width], readout.table[:, :width]
            return self._trace.signature.unflatten([F.linear(hidden, table, readout.bias)])

        return compute

    def _every_size(self, args: Any, kwargs: Any) -> Outputs:
        levels = list(range(self._plan.levels))
        function = self._function("outputs", lambda: outputs_graph(self._trace, self._plan, levels))
        assert function is not None
        flat = function(self.__dict__["_root"], *args, **kwargs)
        count = len(flat) // len(levels)
        unflatten = self._trace.signature.unflatten
        return Outputs(
            {
                s: _given(unflatten(flat[i * count : (i + 1) * count]))
                for i, s in enumerate(self.sizes)
            }
        )


def _live_graph(trace: Trace, plan: Plan, level: int) -> fx.Graph:
    from matryoshkafy.rewrite.codegen import CallCodeGen

    graph = outputs_graph(trace, plan, [level])
    graph.set_codegen(CallCodeGen(trace.signature))
    return graph


def _given(value: Any) -> Callable[[], Any]:
    return lambda: value
