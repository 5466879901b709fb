"""Doll: the converted model. A module that computes as the user's does, at full size or at every
size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn

from matryoshkafy.dolls.caveats import Caveats, refuse_training, refuse_transform, why_untrained
from matryoshkafy.dolls.pickling import Reduced, reduced
from matryoshkafy.graph.trace import Trace
from matryoshkafy.outputs import Late, Moment, Outputs, Readout, read
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.codegen import CallCodeGen
from matryoshkafy.rewrite.graphs import full_graph, outputs_graph
from matryoshkafy.rewrite.readouts import LastLinear, inner_width, last_linear, readout_graph
from matryoshkafy.rewrite.segments import checkpointed, compiled

Function = Callable[..., Any]
Args = tuple[object, ...]
Kwargs = Mapping[str, object]


class Doll(nn.Module):
    """A matryoshka model: every prefix of its widths is a model of its own.

    Call it as the user's model, at full size; `outputs` gives every size. It holds the user's own
    parameters under their own names, so optimizers and checkpoints of the user's keep working.
    `sizes` (ascending), `plan`, `device` and `dtype` are attributes, and so is what the user's
    model said of itself (`config`), where it was just converted. Made by `convert` and `load`.
    Its submodules hold tensors and compute nothing: a hook on one of them never runs, one on the
    doll runs with its call, and the linears of a slice are `nn.Linear` again.

    Args:
        trace: the graph, and the tensors that it reads.
        plan: what nests.
        attributes: plain attributes of the user's model.
    """

    def __init__(
        self, trace: Trace, plan: Plan, attributes: Mapping[str, object] | None = None
    ) -> None:
        super().__init__()
        self.__dict__["_attributes"] = dict(attributes or {})
        root = trace.root
        # The graph reads names off `_root`, where no method of ours can hide a user's module.
        self.__dict__.update(tables_of(root))
        self.__dict__["_root"] = root
        self._trace, self._plan = trace, plan
        self._parts = 0
        self._functions: dict[object, Function] = {}
        self._forward = compiled(full_graph(trace, plan))
        self.train(root.training and not why_untrained(plan))
        self._caveats = Caveats(plan)

    @property
    def sizes(self) -> list[int]:
        """The sizes of the ladder, ascending; the last is the model's width."""
        return list(self._plan.sizes)

    @property
    def plan(self) -> Plan:
        """The frozen analysis that this model was built from."""
        return self._plan

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def __reduce__(self) -> Reduced:
        return reduced(self)

    def __deepcopy__(self, memo: dict[int, object]) -> Doll:
        # Inside a process no words are needed: graph and plan are never written to, and an op that
        # a file may not name may well be copied.
        root = copy.deepcopy(self.__dict__["_root"], memo)
        made = Doll(replace(self._trace, root=root), self._plan, self.__dict__["_attributes"])
        return made.checkpoint_gradients(self._parts) if self._parts else made

    def train(self, mode: bool = True) -> Doll:
        """Switch dropout and batch norm, as in any module.

        Raises `TraceError` where the graph does not train as the user's model does.
        """
        if mode:
            refuse_training(self._plan, "doll")
        super().train(mode)
        self.__dict__["_root"].training = mode
        return self

    def checkpoint_gradients(self, parts: int = 8) -> Doll:
        """Keep for the backward what passes between `parts` of the graph alone; returns the doll.

        The rest is computed again (Chen et al. 2016): about a third more time for about the square
        root of the memory, at every size. 0 or 1 keeps everything.
        """
        self._parts, self._functions = parts, {}
        self._forward = self._compiled(full_graph(self._trace, self._plan))
        return self

    @property
    def recomputes(self) -> bool:
        """Whether `checkpoint_gradients` is on."""
        return self._parts > 1

    def _compiled(self, graph: fx.Graph) -> Function:
        return checkpointed(graph, self._parts) if self.recomputes else compiled(graph)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Compute the user's model at full size: same arguments, same output structure."""
        self._caveats(self)
        refuse_transform(self._plan)
        return self._forward(self.__dict__["_root"], *args, **kwargs)

    def outputs(self, *args: object, **kwargs: object) -> Outputs:
        """Return {size: output} for every size; each output has the structure of the user's.

        Masked nesting: one pass over the trunk, the tail once per size. Sliced nesting: one pass
        per size, over live slices of the shared parameters. What is not needed at once is computed
        when it is first read, as of this call (see `Outputs`).
        """
        self._caveats(self)
        refuse_transform(self._plan)
        moment = Moment.of(self.__dict__["_root"], (args, kwargs))
        readouts = self._readouts(args, kwargs)
        if readouts and self._last is not None and self._last.alone:
            values = {s: Late(partial(self._read, readouts[s], s)) for s in self.sizes}
        elif not self._plan.masked:
            values = {s: self._pass(i, args, kwargs) for i, s in enumerate(self.sizes)}
        elif readouts:
            every = Late(lambda: self._passes(args, kwargs))
            values = {s: Late(lambda s=s: every.value[s]) for s in self.sizes}
        else:
            values = self._passes(args, kwargs)
        return Outputs(values, readouts, moment)

    @cached_property
    def _last(self) -> LastLinear | None:
        return last_linear(self._trace, self._plan)

    def _function(self, key: object, build: Callable[[], fx.Graph]) -> Function:
        if key not in self._functions:
            self._functions[key] = self._compiled(build())
        return self._functions[key]

    def _pass(self, level: int, args: Args, kwargs: Kwargs) -> Late:
        """One size of a sliced doll."""
        function = self._function(level, lambda: _live_graph(self._trace, self._plan, level))
        return Late(lambda: function(self.__dict__["_root"], *args, **kwargs))

    def _passes(self, args: Args, kwargs: Kwargs) -> dict[int, object]:
        """Every size of a masked doll, from one pass over the trunk."""
        levels = list(range(self._plan.levels))
        function = self._function("outputs", lambda: outputs_graph(self._trace, self._plan, levels))
        flat = function(self.__dict__["_root"], *args, **kwargs)
        count, unflatten = len(flat) // len(levels), self._trace.signature.unflatten
        parts = (flat[i * count : (i + 1) * count] for i in levels)
        return dict(zip(self.sizes, map(unflatten, parts), strict=True))

    def _readouts(self, args: Args, kwargs: Kwargs) -> dict[int, Readout | Late]:
        """The last linear: one of all sizes in masked nesting, one of each in sliced."""
        found, plan = self._last, self._plan
        if found is None:
            return {}
        if plan.masked:
            widths = {s: inner_width(plan, found, i) for i, s in enumerate(self.sizes)}
            one = Late(lambda: self._readout(found, plan.levels - 1, widths, (args, kwargs)))
            return dict.fromkeys(self.sizes, one.value if found.alone else one)
        return {
            size: Late(partial(self._readout, found, level, {size: None}, (args, kwargs)))
            for level, size in enumerate(self.sizes)
        }

    def _readout(
        self,
        found: LastLinear,
        level: int,
        widths: Mapping[int, int | None],
        call: tuple[Args, Kwargs],
    ) -> Readout:
        function = self._function(
            ("readout", level), lambda: readout_graph(self._trace, self._plan, found, level)
        )
        args, kwargs = call
        hidden, table, bias, *tensors = function(self.__dict__["_root"], *args, **kwargs)
        table = table.t() if found.turned else table
        scale, of_bias = found.scales(tensors, self._plan, level)
        bias = bias if bias is None else bias.reshape(-1) * of_bias
        known = {s: table.shape[1] if n is None else n for s, n in widths.items()}
        return Readout(hidden, table, bias, known, scale)

    def _read(self, readout: Readout | Late, size: int) -> object:
        return self._trace.signature.unflatten([read(readout).logits(size)])


def trace_of(doll: Doll) -> Trace:
    """Return the trace that a doll runs."""
    return doll.__dict__["_trace"]


def replan(doll: Doll, plan: Plan) -> None:
    """Give a doll the plan that says what was done to its parameters in place."""
    doll.__dict__["_plan"] = plan


def unsaid(doll: Doll) -> None:
    """Let the next call of a doll count as its first: what was said so far was said to nobody."""
    doll.__dict__["_caveats"] = Caveats(doll.plan)


def tables_of(module: nn.Module) -> dict[str, Any]:
    """Return where a module holds its tensors and parts: who shares them shares the names."""
    names = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {name: module.__dict__[name] for name in names}


def attributes_of(doll: Doll) -> dict[str, object]:
    """Return what the user's model said of itself."""
    return dict(doll.__dict__["_attributes"])


def root_of(doll: Doll) -> nn.Module:
    """Return the containers of a doll's tensors, which its graph reads them from."""
    return doll.__dict__["_root"]


def _live_graph(trace: Trace, plan: Plan, level: int) -> fx.Graph:
    graph = outputs_graph(trace, plan, [level])
    graph.set_codegen(CallCodeGen(trace.signature))
    return graph
