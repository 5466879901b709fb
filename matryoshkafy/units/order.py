"""order(): the units of every group by importance, the full model's function unchanged."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import flat_inputs, run_graph
from matryoshkafy.dolls.doll import Doll, replan, trace_of
from matryoshkafy.dolls.measure import doubled, floats_of, relative_error, tolerance_of
from matryoshkafy.rewrite.graphs import outputs_graph
from matryoshkafy.rules import op_of
from matryoshkafy.units import scores as scoring
from matryoshkafy.units.permute import OrderError, Orders, inverse, noted, permute, put_back
from matryoshkafy.units.report import OrderReport, cka, group_orders
from matryoshkafy.units.scores import SCORES, Loss
from matryoshkafy.units.sites import measure

UNREAD = ("refuse", "leave")
ROWS = 4096
WIDENED = 2 << 30  # bytes of parameters of which a copy in float64 is made


def order(  # noqa: PLR0913  the public signature
    doll: Doll,
    batches: Iterable[object],
    *,
    by: str = "activation",
    loss: Loss | None = None,
    keep: Sequence[str] = (),
    unread: str = "refuse",
) -> OrderReport:
    """Order the units of every group of a sliced doll, the most important first, in place.

    The full model stays the same function: a permutation is applied to every parameter that
    carries the group. A group whose order carries meaning (slopes or tables made from the index) is
    found by comparing the full model on the first batch, and keeps its order; the report says so.

    Args:
        doll: a doll in sliced nesting; its parameters, which are the user's, are permuted.
        batches: calibration inputs, each a tensor, a tuple of arguments, or a mapping of keywords;
            a few hundred rows suffice. They are read once.
        by: "activation" (Minitron), "outgoing" (activation times the norm of the outgoing weight),
            "contribution" (greedy, follows correlations; squares of the widths in memory), or
            "taylor" (needs `loss`).
        loss: loss(output, batch) -> scalar, for "taylor".
        keep: patterns of group names that keep their order.
        unread: what happens to parameters that the traced path does not read (a pooler beside the
            output that was traced): "refuse", or "leave" them in the old order, where they no
            longer fit.

    Returns:
        The report, which prints as a table.

    Raises:
        OrderError: a masked doll, no batch, an unknown score, unread parameters.
    """
    batches = list(batches)
    left = checked(doll, batches, by, loss, unread)
    if doll.plan.options.scope == "output":
        raise OrderError(
            'a doll of scope="output" was given: no weight of it nests, so no permutation can '
            "reach its units. rotate turns the output where a weight writes it; or convert with "
            'scope="full"'
        )
    training = doll.training
    doll.eval()
    try:
        return _ordered(doll, batches, (by, loss), (tuple(keep), left))
    finally:
        doll.train(training)


def checked(
    doll: Doll, batches: Sequence[object], by: str, loss: Loss | None, unread: str
) -> tuple[str, ...]:
    """Return the tensors that the traced path does not read; raises `OrderError`."""
    _check(doll, by, loss, unread)
    if not batches:
        raise OrderError("no batch was given; give a few hundred rows of inputs as the model's own")
    left = _unread(doll)
    if left and unread == "refuse":
        raise OrderError(
            f"the traced path does not read {', '.join(left[:4])}: their axes are not known, so "
            "they cannot follow the new order and would no longer fit. Convert a forward that "
            'reads them, or give unread="leave" where nothing else uses them'
        )
    return left


def _check(doll: Doll, by: str, loss: Loss | None, unread: str) -> None:
    known = (*SCORES, "taylor")
    if not isinstance(cast("object", doll), Doll):
        raise OrderError(
            f"a {type(doll).__name__} was given; expected the doll that convert returns"
        )
    if doll.plan.masked and doll.plan.options.scope != "output":
        raise OrderError(
            "a masked doll was given: masks change the full model, so there is no function to "
            'keep. Convert with nesting="sliced"'
        )
    if by not in known or unread not in UNREAD:
        raise OrderError(
            f"by={by!r}, unread={unread!r} was given; expected by one of {', '.join(known)}, "
            f"unread one of {', '.join(UNREAD)}"
        )
    if (by == "taylor") != (loss is not None):
        raise OrderError(
            'by="taylor" needs loss=, a function (output, batch) -> scalar, and no other score '
            "reads one"
        )


def _unread(doll: Doll) -> tuple[str, ...]:
    """Return the floating tensors of the model that no node of the graph reads."""
    state = trace_of(doll).state()
    targets = (str(n.target) for n in trace_of(doll).graph.nodes if n.op == "get_attr")
    read = {id(state[name]) for name in targets if name in state}
    return tuple(
        name
        for name, tensor in state.items()
        if id(tensor) not in read and tensor.is_floating_point() and tensor.dim() > 0
    )


def _ordered(
    doll: Doll,
    batches: list[object],
    how: tuple[str, Loss | None],
    what: tuple[Sequence[str], tuple[str, ...]],
) -> OrderReport:
    plan, (by, loss), (keep, left) = doll.plan, how, what
    scores = _scores(doll, batches, by, loss)
    kept = _kept(doll, keep)
    wanted = {
        g: torch.argsort(scores[g], descending=True, stable=True)
        for g in range(len(plan.groups))
        if g not in kept
    }
    probe = flat_inputs(doll, batches[0])
    before = _agreements(doll, probe)
    orders, error, differing = _applied(doll, wanted, probe)
    replan(doll, noted(plan, orders))
    kept |= differing
    after = _agreements(doll, probe)
    return OrderReport(
        by=by,
        sizes=plan.sizes,
        groups=group_orders(plan, scores, orders, kept),
        orders=tuple(
            tuple(map(int, orders[g])) if g in orders else None for g in range(len(plan.groups))
        ),
        error=error,
        agreement=tuple(zip(before, after, strict=True)),
        unread=left,
    )


def _scores(doll: Doll, batches: list[object], by: str, loss: Loss | None) -> list[Tensor]:
    groups = range(len(doll.plan.groups))
    if loss is not None:
        found = scoring.taylor(doll, batches, loss)
        return [found[g] for g in groups]
    flat = (flat_inputs(doll, batch) for batch in batches)
    measured = measure(doll, flat, moments=by == "contribution")
    return [SCORES[by](doll.plan, measured, g).cpu() for g in groups]


def _kept(doll: Doll, patterns: Sequence[str]) -> dict[int, str]:
    """Return the groups that keep their order, with the reason, as far as the graph says."""
    plan = doll.plan
    kept: dict[int, str] = {}
    for g, group in enumerate(plan.groups):
        if any(fnmatch.fnmatch(group.name, pattern) for pattern in patterns):
            kept[g] = "named in keep="
    for node in trace_of(doll).graph.nodes:
        why = _meaning(node)
        shape = plan.dims(node.name)
        for dim in shape if why else ():
            kept |= {g: f"{why} {node.name}" for g in dims.groups_of(dim) if g not in kept}
    return kept


def _meaning(node: fx.Node) -> str:
    """Say why the order of this value's axes is given from outside; "" where it is not."""
    if node.op == "placeholder":
        return "it comes in with the input"
    constant = node.op == "call_function" and not node.all_input_nodes
    # The same at every index: such an axis has no order to lose.
    uniform = op_of(node).uniform
    return "it is counted at" if constant and not uniform else ""


def _applied(
    doll: Doll, wanted: Orders, probe: list[Tensor]
) -> tuple[dict[int, Tensor], float, dict[int, str]]:
    """Permute; return the orders applied, the full model's error, and the groups left out."""
    reference = run_graph(doll, trace_of(doll).graph, probe)
    error = _tried(doll, wanted, probe, reference)
    if error <= tolerance_of(doll):
        return dict(wanted), error, {}
    _undo(doll, wanted)
    fine, out = _separated(_widened(doll, probe, reference), wanted, tolerance_of(doll))
    return fine, _tried(doll, fine, probe, reference), out


# A model, its inputs and what it makes of them in the users' order.
Judge = tuple[Doll, list[Tensor], list[object]]


def _separated(
    judge: Judge, wanted: Orders, tolerance: float
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Return the orders that keep the full model what it is, and why others do not; apply none."""
    doll, probe, reference = judge
    out: dict[int, str] = {}
    for group, one in wanted.items():
        error = _tried(doll, {group: one}, probe, reference)
        _undo(doll, {group: one})
        if not error <= tolerance:
            out[group] = f"its order carries meaning (the full model moves by {error:.0e} without)"
    fine = {g: one for g, one in wanted.items() if g not in out}
    error = _tried(doll, fine, probe, reference)
    _undo(doll, fine)
    if not error <= 10 * tolerance:
        raise OrderError(
            f"the full model moves by {error:.1e} when all groups are ordered together though none "
            "moves it alone; nothing was changed. Name the groups to leave out in keep="
        )
    return fine, out


def _widened(doll: Doll, probe: list[Tensor], reference: list[object]) -> Judge:
    """Return a copy in float64, where rounding does not pass for meaning; else the doll itself.

    Large models, and those that cannot be copied or have an operator without float64, are judged
    in their own type.
    """
    if sum(t.nbytes for t in doll.parameters()) > WIDENED:
        return doll, probe, reference
    try:
        wide, inputs = doubled(doll, probe)
        return wide, inputs, run_graph(wide, trace_of(wide).graph, inputs)
    except (RuntimeError, TypeError):
        return doll, probe, reference


def _undo(doll: Doll, orders: Orders) -> None:
    permute(trace_of(doll).state(), doll.plan, inverse(orders))


def _tried(doll: Doll, orders: Orders, probe: list[Tensor], reference: list[object]) -> float:
    permute(trace_of(doll).state(), doll.plan, orders)
    found = run_graph(doll, trace_of(doll).graph, probe)
    return relative_error(put_back(doll, orders, found), reference)


def _agreements(doll: Doll, probe: list[Tensor]) -> list[float]:
    """Return per size the linear CKA of its first floating output with the full model's."""
    values: list[Tensor] = []
    for level in range(doll.plan.levels):
        graph = outputs_graph(trace_of(doll), doll.plan, [level])
        found = run_graph(doll, graph, probe)
        values.append(next(floats_of(found), torch.zeros(1, 1)))
    return [_agreement(value, values[-1]) for value in values]


def _agreement(value: Tensor, full: Tensor) -> float:
    """Return the linear CKA of two outputs over at most `ROWS` rows.

    The features are the dims in which the two differ (channels may stand in the middle); where none
    does, the last.
    """
    pairs = enumerate(zip(value.shape, full.shape, strict=True))
    wide = [i for i, (a, b) in pairs if a != b] or [value.dim() - 1]
    return cka(*(_rows(one, wide) for one in (value, full)))


def _rows(value: Tensor, features: list[int]) -> Tensor:
    if not value.dim():
        return value.reshape(1, 1)
    count = len(features)
    last = value.movedim(features, list(range(-count, 0))).flatten(-count)
    return last.reshape(-1, last.shape[-1])[:ROWS]
