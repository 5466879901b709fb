"""inspect() and convert(): from the user's model to a plan, and to a doll."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from matryoshkafy.doll import Doll
from matryoshkafy.errors import PlanError
from matryoshkafy.plan import Options, Plan
from matryoshkafy.propagation import propagate
from matryoshkafy.solving import Request, output_plan, solve
from matryoshkafy.tracing import Trace, trace

CHOICES = {
    "nesting": ("masked", "sliced"),
    "scope": ("full", "ffn", "output"),
    "norm": ("block", "prefix"),
}


def inspect(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Any = None,
    scope: str = "full",
    keep: Sequence[str] = (),
    nesting: str | None = None,
) -> Plan:
    """Return the plan of a model: which axes are widths. Nothing is changed.

    Arguments: `args`, `kwargs` example inputs of the forward; `sizes` a ladder such as "64..1024"
    (default: ratios 1/4, 1/2, 1); `scope` full, ffn or output; `keep` patterns of parameter or module
    names that stay whole; `nesting` masked (default, except for scope ffn) or sliced.

    Raises `TraceError` (with the user's line), `NothingNests`, `PlanError`, `SizesError`.
    """
    options = _options(nesting or ("sliced" if scope == "ffn" else "masked"), scope, "block", keep)
    return _plan(trace(model, args, kwargs), Request(options, sizes))


def convert(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Any,
    nesting: str = "masked",
    scope: str = "full",
    norm: str = "block",
    keep: Sequence[str] = (),
    overrides: Mapping[str, Sequence[int]] | None = None,
) -> Doll:
    """Return the model as a matryoshka doll that shares its parameters.

    Arguments: as for `inspect`; `nesting` "masked" (one full pass holds every size; for training from
    scratch or fine-tuning) or "sliced" (the full model keeps its function; one pass per size); `norm`
    "block" or "prefix", the statistics of norms in masked nesting; `overrides` {group name: widths,
    one for each size}.

    Raises `TraceError` (with the user's line), `NothingNests`, `PlanError`, `SizesError`.
    """
    request = Request(_options(nesting, scope, norm, keep), sizes, overrides)
    traced = trace(model, args, kwargs)
    return Doll(traced, _plan(traced, request))


def _options(nesting: str, scope: str, norm: str, keep: Sequence[str]) -> Options:
    for name, value in (("nesting", nesting), ("scope", scope), ("norm", norm)):
        if value not in CHOICES[name]:
            raise PlanError(f"{name}={value!r} was given; expected one of {', '.join(CHOICES[name])}")
    if scope == "ffn" and nesting == "masked":
        raise PlanError(
            'scope="ffn" nests hidden axes only, so each size is a pass of its own; '
            'give nesting="sliced" with it'
        )
    return Options(nesting, scope, norm, (keep,) if isinstance(keep, str) else tuple(keep))


def _plan(traced: Trace, request: Request) -> Plan:
    if request.options.scope == "output":
        return output_plan(traced, request)
    free = tuple(k.removeprefix("input:") for k in request.options.keep if k.startswith("input:"))
    return solve(traced, propagate(traced, free), request)
