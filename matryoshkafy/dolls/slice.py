"""slice(): cut a standalone sub-model out of a doll, or a smaller one out of a sub-model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import fx, nn

from matryoshkafy.dolls.caveats import Caveats, refuse_training, why_untrained
from matryoshkafy.dolls.cuts import Kind, cut, kinds_of
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.dolls.pickling import Reduced, reduced
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.trace import Trace, attach, tensors_of
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.stored import statistics
from matryoshkafy.rewrite.graphs import sub_graph
from matryoshkafy.rewrite.linears import as_modules, foreign

# What a tensor's name gets in front where a GraphModule has an attribute of that name.
ESCAPE = "user_"


def slice(model: nn.Module, size: float) -> fx.GraphModule:  # noqa: A001  the field's word for it
    """Return the sub-model of a size: a `torch.fx.GraphModule` that needs neither source nor doll.

    Its parameters stand under the user's names and own their memory. It takes the user's arguments
    and returns the user's output structure.

    Args:
        model: a doll, or a sub-model of one.
        size: one of its sizes, or a ratio of its width, such as 0.5.

    Raises:
        PlanError: no such size; it lists the sizes.
    """
    trace, plan = parts_of(model)
    level = plan.level(size)
    state = state_of(model)
    refuse_missing(plan, state)
    tensors, kinds = cut(trace, plan, state, level)
    return assemble(trace, plan.up_to(level), tensors, kinds)


def parts_of(model: nn.Module) -> tuple[Trace, Plan]:
    """Return the trace and plan of a doll or of a sub-model."""
    if isinstance(model, Doll):
        return trace_of(model), model.plan
    made = model.meta.get("matryoshka") if isinstance(model, fx.GraphModule) else None
    if made is not None:
        trace, plan = cast("tuple[Trace, Plan]", made)
        _check_own(model)
        return replace(trace, root=_named_root(model)), plan
    raise PlanError(
        f"a {type(model).__name__} was given; expected a model from convert, load or slice. "
        "Convert it first: matryoshkafy.convert(model, args, sizes=...)"
    )


def refuse_missing(plan: Plan, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model that has lost tensors since it was made: pruning and parametrizations rename.

    Raises:
        PlanError: names the first of them, and what to do.
    """
    missing = [n for n, kept in plan.stored.items() if not kept.source and n not in state]
    if missing:
        raise PlanError(
            f"the model has no tensor {missing[0]!r} any more; expected those of its conversion. "
            "Take off what replaced it (torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations), or convert the changed model."
        )


def _check_own(model: nn.Module) -> None:
    """Refuse a sub-model in which another library has replaced linears: its weights are others."""
    found = foreign(model)
    if found:
        name, kind = next(iter(found.items()))
        raise PlanError(
            f"{name} of the sub-model is a {kind}, which another library put there; expected the "
            "linears that slice made. Merge the adapter first (merge_and_unload of peft), or save "
            "it by that library."
        )


def _named_root(model: nn.Module) -> nn.Module:
    """Return containers of the sub-model's tensors under the user's names."""
    root = nn.Module()
    for name, tensor in state_of(model).items():
        attach(root, name, tensor)
    root.training = model.training
    return root


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of a doll or sub-model under the user's names, ties included."""
    escaped = isinstance(model, fx.GraphModule)
    return {_own_name(n) if escaped else n: tensor for n, tensor in tensors_of(model).items()}


def _own_name(name: str) -> str:
    return name.removeprefix(ESCAPE) if _is_taken(name) else name


def _mention(graph: fx.Graph, names: list[str]) -> None:
    """A GraphModule keeps what its graph names: the other names of tied tensors, too."""
    read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    called = [str(n.target) for n in graph.find_nodes(op="call_module")]
    read |= {f"{name}.{leaf}" for name in called for leaf in ("weight", "bias")}
    first = next(iter(graph.nodes))
    with graph.inserting_before(first), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name not in read:
                graph.get_attr(name)


def free_name(name: str) -> str:
    """Return the name of a tensor in a GraphModule, which has attributes of its own (graph, code).

    Two names never become one: what is called as if it were escaped is escaped once more.
    """
    return f"{ESCAPE}{name}" if _is_taken(name) else name


def _is_taken(name: str) -> bool:
    head = name.partition(".")[0]
    while head.startswith(ESCAPE):
        head = head.removeprefix(ESCAPE)
    return head != "training" and (head in _own_attributes() or hasattr(fx.GraphModule, head))


@cache
def _own_attributes() -> frozenset[str]:
    """What every GraphModule keeps in itself: meta, shape_env, the graph and its code."""
    graph = fx.Graph()
    graph.output(None)
    return frozenset(vars(fx.GraphModule(nn.Module(), graph)))


class SubModel(fx.GraphModule):
    """A standalone sub-model; pickled and copied by its tensors and its plan, not by its code."""

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        if name == "generate":
            raise AttributeError(
                "a slice is a graph without a cache, so it has no generate(); expected its native "
                "class, mk.native(small, like=model).generate(...), or in masked nesting a decoder "
                "with one cache for every size, matryoshkafy.serving.Decoder(doll, ids)."
            )
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> SubModel:
        """Switch dropout and batch norm, as in any module.

        Raises `TraceError` where the doll that it was cut from does not train as the model does.
        """
        if mode and "matryoshka" in self.meta:
            refuse_training(self.meta["matryoshka"][1], "sub-model")
        super().train(mode)
        return self

    def __reduce__(self) -> Reduced:
        return reduced(self)

    def __deepcopy__(self, memo: dict[int, object]) -> fx.GraphModule:
        if foreign(self):
            return super().__deepcopy__(memo)
        # As a doll: graph and plan are never written to, so the tensors alone are copied.
        trace, plan = parts_of(self)
        state = state_of(self)
        return assemble(trace, plan, copy.deepcopy(state, memo), kinds_of(state))


def assemble(
    trace: Trace, plan: Plan, tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, Kind]
) -> fx.GraphModule:
    """Return the GraphModule of the largest size of a plan over tensors that are cut to it."""
    graph, root = _parts(trace, plan, tensors, kinds)
    _mention(graph, [free_name(name) for name in tensors])
    module = SubModel(root, graph, class_name="SubModel")
    # Each module has a class of its own, so its forward may say what the user's takes.
    vars(type(module))["forward"].__signature__ = trace.signature.of_forward()
    module.meta["matryoshka"] = (replace(trace, root=nn.Module()), plan)
    module.train(root.training and not why_untrained(plan))
    caveats = Caveats(plan)
    if caveats:
        module.register_forward_pre_hook(caveats)
    return module


def _parts(
    trace: Trace, plan: Plan, tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, Kind]
) -> tuple[fx.Graph, nn.Module]:
    root = nn.Module()
    root.training = trace.root.training
    objects: dict[int, torch.Tensor] = {}
    hidden = trace.hidden | set(statistics(plan))
    for name, tensor in tensors.items():
        kind = kinds[name]
        name, kept_name = free_name(name), name
        if kind.parameter and id(tensor) not in objects:
            # A copy of a sub-model keeps its parameters: an optimiser copied with it holds them.
            made = isinstance(tensor, nn.Parameter) and tensor.requires_grad == kind.requires_grad
            objects[id(tensor)] = (
                tensor if made else nn.Parameter(tensor, requires_grad=kind.requires_grad)
            )
        attach(root, name, objects.get(id(tensor), tensor), persistent=kept_name not in hidden)
    graph = sub_graph(replace(trace, root=root), plan, plan.levels - 1)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = free_name(str(node.target))
    as_modules(root, graph)
    return graph, root
