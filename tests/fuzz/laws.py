"""The laws, checked on a random model; what breaks raises `Broken`, a refusal is returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import verify
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.plan.freeze import Request
from matryoshkafy.plan.plan import Options
from matryoshkafy.plan.solve import solve
from matryoshkafy.plan.walk import propagate
from tests.fuzz.building import direct_trace
from tests.fuzz.graphs import Built

TOLERANCE = 1e-9


class Broken(AssertionError):
    """A law that does not hold."""


def doll_of(built: Built, options: Options, *, exported: bool = False) -> Doll:
    """Return the doll of a random model, over the recorded graph or through the real trace."""
    built.model.eval()
    if exported:
        return mk.convert(built.model, built.inputs, sizes=_sizes(built, options),
                          nesting=options.nesting, norm=options.norm)  # fmt: skip
    trace = direct_trace(built.model, built.inputs)
    return Doll(trace, solve(trace, propagate(trace), Request(options, _ladder(built))))


def _ladder(built: Built) -> list[float] | None:
    """Two rungs, or the three of the default: a sub-model costs more than the rest of a case."""
    return None if built.program.seed % 3 == 0 else [0.4, 1.0]


def _sizes(built: Built, options: Options) -> list[int]:
    return list(mk.inspect(built.model, built.inputs, nesting=options.nesting).sizes)


def check(built: Built, options: Options, *, exported: bool = False) -> str | None:
    """Check every law; return the reason of a refusal, or None. Raises `Broken`."""
    try:
        doll = doll_of(built, options, exported=exported)
    except MatryoshkafyError as refusal:
        return f"{type(refusal).__name__}: {str(refusal)[:60]}"
    with torch.no_grad():
        if not doll.plan.masked:
            _same(doll(*built.inputs), built.outputs, "full identity")
        report = verify(doll, built.inputs)
        if not report.passed:
            raise Broken(f"verify\n{report}")
        _replayed(built, doll)
    return None


def _replayed(built: Built, doll: Doll) -> None:
    """Each sub-model (of a masked doll the smallest) is the user's model at that width."""
    for size in doll.sizes[:1] if doll.plan.masked else doll.sizes[:-1]:
        small = mk.slice(doll, size)
        empty = [n for n, t in small.state_dict().items() if t.numel() == 0]
        if empty:
            raise Broken(f"size {size} has nothing of {empty}")
        run = built.run
        if run.native and not (run.constant and run.copied):
            _same(small(*built.inputs), _native(built, small), f"native model of size {size}")


def _native(built: Built, small: fx.GraphModule) -> tuple[Tensor, ...]:
    try:
        return built.replay(built.model.state_dict() | small.state_dict())
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise Broken(f"no model of this kind has the shapes of the sub-model: {error}") from error


def _same(actual: Any, expected: tuple[Tensor, ...], law: str) -> None:
    values = actual if isinstance(actual, (tuple, list)) else (actual,)
    for i, (a, e) in enumerate(zip(values, expected, strict=True)):
        if a.shape != e.shape:
            raise Broken(f"{law}: output {i} has shape {tuple(a.shape)}, not {tuple(e.shape)}")
        worst = float((a - e).abs().max() / e.abs().max().clamp(min=1e-30)) if e.numel() else 0.0
        if not (worst <= TOLERANCE or bool(torch.equal(a.isnan(), e.isnan()) and e.isnan().any())):
            raise Broken(f"{law}: output {i} differs by {worst:.1e}")
