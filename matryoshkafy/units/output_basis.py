"""The vector that a model returns, turned into its principal directions: for scope="output"."""

from __future__ import annotations

from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import flat_inputs
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.errors import PlanError
from matryoshkafy.graph.nodes import outputs_of
from matryoshkafy.plan.output_scope import axis_plan
from matryoshkafy.plan.plan import Plan
from matryoshkafy.units.exactly import Turned, turned_exactly
from matryoshkafy.units.permute import OrderError
from matryoshkafy.units.sites import Site, measure_at
from matryoshkafy.units.survey import survey
from matryoshkafy.units.turning import moment_from


def turned_output(doll: Doll, batches: list[object]) -> tuple[Turned, Plan]:
    """Turn the output of a doll of scope="output" in place; return what was done, and the plan that
    knows which outputs carry the axis.

    Raises:
        OrderError: what stands in the way; nothing has changed then.
    """
    trace = trace_of(doll)
    try:
        plan = axis_plan(trace, doll.plan)
    except PlanError as error:
        raise _refused(str(error)) from None
    seen = survey(trace.graph, plan, trace.state(), 0)
    if seen.obstacles:
        raise _refused(seen.obstacles[0])
    made = turned_exactly(doll, plan, seen, batches[0], lambda: _moment(doll, plan, batches))
    if isinstance(made, str):
        raise _refused(made)
    return made, plan


def _moment(doll: Doll, plan: Plan, batches: list[object]) -> Tensor:
    """Return [n, n] the second moment of every output that carries the axis, each alike."""
    sites: list[Site] = []
    for node in (n for n in outputs_of(trace_of(doll).graph) if isinstance(n, fx.Node)):
        shape = plan.dims(node.name)
        if shape and dims.is_nested(shape[-1]):
            sites.append(Site(node.name, len(shape) - 1, shape[-1]))
    flat = (flat_inputs(doll, batch) for batch in batches)
    measured = measure_at(doll, flat, sites, moments=True)
    return moment_from(measured.values(), plan.groups[0].size)


def _refused(why: str) -> OrderError:
    return OrderError(
        f"the output cannot be turned: {why}. Give the model a weight that writes its output: "
        "mk.add_dense(model) before convert, of a sentence encoder; of any other "
        "torch.nn.Sequential(model, torch.nn.Linear(width, width)), whose weight begins as "
        "torch.eye(width)"
    )
