"""solve(): the policies applied one after another, then what masked nesting does, then freeze()."""

from __future__ import annotations

from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.choices import hold_choices
from matryoshkafy.plan.counts import hold_counts
from matryoshkafy.plan.freeze import Request, Solved, freeze
from matryoshkafy.plan.masking import Masking, choose
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.policies import (
    fix_heads,
    hold_kept,
    only_feed_forward,
    parameter_terms,
    settle,
    shares,
    trainable,
)
from matryoshkafy.plan.tables import hold_constants, hold_rows, hold_tables
from matryoshkafy.plan.walk import Findings


def solve(trace: Trace, found: Findings, request: Request) -> Plan:
    """Return the plan of a traced and walked model.

    Raises `NothingNests` where no axis is a width, `PlanError` where the request does not fit.
    """
    # The order matters: what is held early is fixed for all that comes later. Tables and heads look
    # at which axes are summed, `settle` then picks among the free factors of each product, and
    # masking may fix more, after which `settle` has to look again.
    parameters = parameter_terms(trace, found)
    hold_kept(trace, found, request.options.keep)
    hold_tables(trace, found)
    hold_constants(trace, found)
    hold_rows(trace, found)
    hold_choices(trace, found)
    fix_heads(trace, found)
    hold_counts(trace, found)
    settle(found)
    if request.options.scope == "ffn":
        only_feed_forward(trace, found, parameters)
    masking = Masking({}, frozenset(), ())
    if request.options.nesting == "masked" and request.options.scope == "full":
        masking = choose(trace, found, lambda: settle(found), shares(trainable(trace, parameters)))
    return freeze(trace, found, request, Solved(parameters, masking))
