"""scope="output": the last axis of the representation nests, and nothing inside the model (MRL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import fx

from matryoshkafy import axes
from matryoshkafy.axes.dims import Nested
from matryoshkafy.axes.terms import Axis
from matryoshkafy.errors import NothingNests, PlanError
from matryoshkafy.graph.nodes import bound_args, is_tensor, outputs_of, tensor_info
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.freeze import Request, freezer, frozen, sizes_of
from matryoshkafy.plan.plan import Group, Plan, ladder_of
from matryoshkafy.plan.policies import parameter_terms
from matryoshkafy.plan.stored import decided
from matryoshkafy.plan.walk import propagate
from matryoshkafy.rules import op_of

EMBEDDINGS = ("sentence_embedding", "text_embeds", "image_embeds", "pooler_output", "embedding")


def output_plan(trace: Trace, request: Request) -> Plan:
    """Return the plan of scope="output": only the last axis of the representation nests (MRL).

    Every output whose last axis has the width of the representation is cut, and normalised again
    where it was; no weight changes.
    """
    outputs = outputs_of(trace.graph)
    shapes = [tensor_info(v).shape if is_tensor(v) else () for v in outputs]
    place = representation(trace)
    node = outputs[place] if place is not None else None
    width = tensor_info(node).shape[-1] if isinstance(node, fx.Node) else 0
    if width < 2:
        raise NothingNests(
            "the model returns no tensor with a last axis, so there is nothing to nest"
        )
    sizes = sizes_of(request, width)
    group = Group("output", width, ())
    notes = {str(i): (Nested(0, width),) for i, s in enumerate(shapes) if s and s[-1] == width}
    unit = {i: () for i in notes if is_unit_length(outputs[int(i)])}
    plan = Plan(
        options=request.options,
        sizes=sizes,
        main=0,
        unit=1,
        groups=(group,),
        ladder=ladder_of((group,), sizes, width),
        nodes={},
        notes={"output": notes, "unit": unit} if unit else {"output": notes},
        parameters={name: tuple((n,) for n in t.shape) for name, t in trace.state().items()},
        remarks=trace.notes,
    )
    return decided(trace, plan)


def representation(trace: Trace) -> int | None:
    """Return the place of the output that is called one of EMBEDDINGS, else of the first tensor
    that has axes; None without any.
    """
    outputs = outputs_of(trace.graph)
    named: Any = trace.signature.unflatten(list(range(len(outputs))))
    names = cast("Mapping[str, object]", named if isinstance(named, Mapping) else {})
    first = [names[n] for n in EMBEDDINGS if n in names]
    order = [*[i for i in first if isinstance(i, int)], *range(len(outputs))]
    shaped = {i for i, v in enumerate(outputs) if is_tensor(v) and tensor_info(v).shape}
    return next((i for i in order if i in shaped), None)


def axis_plan(trace: Trace, plan: Plan) -> Plan:
    """Return the plan with the dims of every value and tensor that carries the output's axis.

    Raises:
        PlanError: the axis is put together of others, or an op holds its units in their places.
    """
    place = representation(trace)
    found = propagate(trace)
    node = outputs_of(trace.graph)[place] if place is not None else None
    terms = found.of(node) if isinstance(node, fx.Node) else ()
    factors = axes.resolve(terms[-1]) if terms else ()
    axis = factors[0] if len(factors) == 1 else None
    if not isinstance(axis, Axis) or axis.fixed is not None:
        held = axis.fixed if isinstance(axis, Axis) else None
        why = "is put together of several" if held is None else f"stays whole ({held.kind})"
        raise PlanError(f"the last axis of the output {why}; expected one axis that weights write")
    dim_of = freezer({axis: 0})
    parameters = {
        name: tuple(map(dim_of, terms)) for name, terms in parameter_terms(trace, found).items()
    }
    nodes = {n.name: frozen(found.terms[n], dim_of) for n in found.terms if n.op != "output"}
    return replace(plan, nodes=nodes, parameters={**plan.parameters, **parameters})


def is_unit_length(node: object) -> bool:
    """Tell whether a value is x / |x| over its last axis, as torch.nn.functional.normalize is."""
    if not isinstance(node, fx.Node) or op_of(node).algebra != "divide" or len(node.args) < 2:
        return False
    source, norm = node.args[:2]
    while isinstance(norm, fx.Node) and op_of(norm).algebra in ("bound", "spread"):
        norm = norm.args[0]
    if not isinstance(norm, fx.Node) or op_of(norm).algebra != "length":
        return False
    given = bound_args(norm)
    of, last = given.get("self", given.get("x")), len(tensor_info(node).shape) - 1
    along = [d % (last + 1) for d in given.get("dim") or ()]
    return of is source and along == [last] and given.get("ord", given.get("p", 2)) in (2, None)
