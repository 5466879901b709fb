"""inspect() and convert(): from the user's model to a plan, and to a doll."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.tracing import traced
from matryoshkafy.dolls.verify import verify
from matryoshkafy.errors import PlanError, TraceError
from matryoshkafy.graph.quiet import silent
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.freeze import Request, output_plan
from matryoshkafy.plan.plan import Options, Plan
from matryoshkafy.plan.solve import solve
from matryoshkafy.plan.walk import propagate

CHOICES = {
    "nesting": ("masked", "sliced"),
    "scope": ("full", "ffn", "output"),
    "norm": ("block", "prefix"),
}


def inspect(  # noqa: PLR0913  the public signature
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
    (default: ratios 1/4, 1/2, 1); `scope` full, ffn or output; `keep` patterns of parameter or
    module names that stay whole, or "scalar:NODE" for a constant; `nesting` masked (default, except
    for scope ffn) or sliced.

    Raises `TraceError` (with the user's line), `NothingNests`, `PlanError`, `SizesError`.
    """
    options = _options(nesting or ("sliced" if scope == "ffn" else "masked"), scope, "block", keep)
    return _plan(traced(model, args, kwargs), Request(options, sizes))


def convert(  # noqa: PLR0913  the public signature
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Any,
    nesting: str = "masked",
    scope: str = "full",
    norm: str = "block",
    keep: Sequence[str] = (),
    overrides: Mapping[str, Sequence[Any]] | None = None,
) -> Doll:
    """Return the model as a matryoshka doll that shares its parameters.

    Arguments: as for `inspect`; `nesting` "masked" (one full pass holds every size; for training
    from scratch or fine-tuning) or "sliced" (the full model keeps its function; one pass per size);
    `norm` "block" or "prefix", the statistics of norms in masked nesting; `overrides` {group name:
    widths, one for each size; "inputs": names of inputs whose last axis nests with the model's}.

    Raises `TraceError` (with the user's line), `NothingNests`, `PlanError`, `SizesError`.
    """
    request = Request(_options(nesting, scope, norm, keep), sizes, overrides)
    return _doll(traced(model, args, kwargs), request, args, kwargs)


def _doll(found: Trace, request: Request, args: Any, kwargs: Any) -> Doll:
    """Build the doll; one path of a branching forward must keep the laws on its example."""
    doll = Doll(found, _plan(found, request))
    note = next((n for n in found.notes if n.startswith("specialised")), None)
    failure = _failure(doll, args, kwargs) if note else None
    if note and failure:
        reason = note.removeprefix("specialised: the forward ").partition(";")[0]
        raise TraceError(
            f"the path that the example takes cannot be taken at every size:\n{failure}\n"
            f"The forward {reason}; which rows it works on depends on values that differ between "
            "the sizes. Rewrite that part with masks of a fixed shape (torch.where, one product "
            "over all experts)."
        )
    return doll


def _failure(doll: Doll, args: Any, kwargs: Any) -> str | None:
    """Return which law fails on the example, or what stops a size; None if all is well."""
    try:
        with silent():
            report = verify(doll, args, kwargs)
    except (RuntimeError, IndexError) as error:
        return str(error).splitlines()[0]
    return None if report.passed else str(report)


def _options(nesting: str, scope: str, norm: str, keep: Sequence[str]) -> Options:
    for name, value in (("nesting", nesting), ("scope", scope), ("norm", norm)):
        if value not in CHOICES[name]:
            raise PlanError(
                f"{name}={value!r} was given; expected one of {', '.join(CHOICES[name])}"
            )
    if scope == "ffn" and nesting == "masked":
        raise PlanError(
            'scope="ffn" nests hidden axes only, so each size is a pass of its own; '
            'give nesting="sliced" with it'
        )
    return Options(nesting, scope, norm, (keep,) if isinstance(keep, str) else tuple(keep))


def _plan(found: Trace, request: Request) -> Plan:
    if request.options.scope == "output":
        return output_plan(found, request)
    free = tuple((request.overrides or {}).get("inputs", ()))
    inputs = [n.name for n in found.graph.nodes if n.op == "placeholder"]
    if not set(free) <= set(inputs):
        raise PlanError(f"overrides free the inputs {list(free)}; the inputs are {inputs}")
    return solve(found, propagate(found, free), request)
