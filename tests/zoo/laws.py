"""The laws of the design on one entry of the zoo, as numbers: used by the tests and by the
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.dolls.calls import Call
from matryoshkafy.dolls.convert import Asked, checked
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.tracing import traced
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.freeze import Request
from matryoshkafy.plan.plan import Options
from tests.zoo.judge import Wrong, snapshot, unchanged
from tests.zoo.registry import Entry

RATIOS = (0.25, 0.5, 1.0)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """What one nesting of one architecture came to.

    `status`: ok, refused, or broken. Errors are relative to the largest value; `native` compares
    the sliced half size with the same class built from the smaller config (None: no such config).
    `half` is the share of parameters left at half size, `tables` that of whole (fixed) tables in
    them.
    """

    name: str
    family: str
    nesting: str
    status: str
    message: str = ""
    identity: float = 0.0
    laws: float = 0.0
    native: float | None = None
    half: float = 0.0
    tail: float = 0.0
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def measure(entry: Entry) -> list[Row]:
    """Return one row per nesting; the model is traced once."""
    model, args, kwargs = entry.build()
    before, found, text = snapshot(model), None, ""
    try:
        found = traced(model, args, kwargs)
    except mk.MatryoshkafyError as error:
        text = str(error).splitlines()[0]
    changed = _changed(before, model)
    if found is None or changed:
        status = "broken" if changed else "refused"
        rows = ((n, status, changed or text) for n in ("sliced", "masked"))
        return [Row(entry.name, entry.family, *row) for row in rows]
    return [_row(entry, (model, args, kwargs), found, n) for n in ("sliced", "masked")]


def _changed(before: dict[str, Any], model: nn.Module) -> str:
    """Law 0: nothing of the user's model differs after it was looked at, bit for bit."""
    try:
        unchanged(before, model)
    except Wrong as error:
        return str(error)
    return ""


def _row(entry: Entry, built: Any, found: Trace, nesting: str) -> Row:
    model, args, kwargs = built
    before = snapshot(model)
    try:
        plan = Asked(Request(Options(nesting), list(RATIOS)), (), "").plan(found)
        doll = checked(found, plan, Call(model, tuple(args), dict(kwargs)))
    except mk.MatryoshkafyError as error:
        return Row(entry.name, entry.family, nesting, "refused", str(error).splitlines()[0])
    report = mk.verify(doll, args, kwargs)
    mk.slice(doll, doll.sizes[0])
    changed = _changed(before, model)
    identity = _identity(model, doll, (args, kwargs)) if nesting == "sliced" else 0.0
    native = native_error(entry, doll, (args, kwargs)) if nesting == "sliced" else None
    laws = max(max(s.output_error, s.trunk_error, s.beyond_error) for s in report.sizes)
    broken = not report.passed or identity > TOLERANCE or bool(changed)
    return Row(
        entry.name,
        entry.family,
        nesting,
        "broken" if broken else "ok",
        changed,
        identity,
        laws,
        native,
        report.sizes[1].parameters / report.sizes[-1].parameters,
        report.tail_share,
        doll.plan.remarks,
    )


def _identity(model: nn.Module, doll: Doll, call: tuple[Any, Mapping[str, Any]]) -> float:
    args, kwargs = call
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        ours = doll(*args, **kwargs)
        torch.manual_seed(0)
        return relative_error(ours, model(*args, **kwargs))


def native_error(entry: Entry, doll: Doll, call: tuple[Any, Mapping[str, Any]]) -> float | None:
    """Load the half-size slice into the same class built from the smaller config, compare outputs.

    Infinite where the shapes do not fit, None where the class offers no such config.
    """
    if entry.rebuild is None:
        return None
    args, kwargs = call
    small = mk.slice(doll, doll.sizes[1])
    truth = entry.rebuild(RATIOS[1])
    try:
        truth.load_state_dict(small.state_dict(), strict=False)
    except RuntimeError:
        return float("inf")
    with torch.no_grad():
        return relative_error(small(*args, **kwargs), truth.eval()(*args, **kwargs))
