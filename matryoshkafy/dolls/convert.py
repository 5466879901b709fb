"""inspect() and convert(): from the user's model to a plan, and to a doll."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from matryoshkafy.axes import dims
from matryoshkafy.dolls.calls import Call, call_of, plain_attributes
from matryoshkafy.dolls.check import refuse_broken, with_levels
from matryoshkafy.dolls.doll import Doll, trace_of, unsaid
from matryoshkafy.dolls.libraries import caches_off
from matryoshkafy.dolls.obeys import REMEDY, check_sizes
from matryoshkafy.dolls.optional import with_defaults
from matryoshkafy.dolls.pretrained import nesting_of, remarked, say_how_far_off
from matryoshkafy.dolls.tracing import traced
from matryoshkafy.dolls.verify import verify
from matryoshkafy.errors import GuardError, PlanError, TraceError, first_line
from matryoshkafy.graph.capture import SPECIALISED
from matryoshkafy.graph.quiet import silent, uncollected
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.freeze import Request
from matryoshkafy.plan.output_scope import output_plan
from matryoshkafy.plan.plan import Options, Plan
from matryoshkafy.plan.policies import input_names
from matryoshkafy.plan.solve import solve
from matryoshkafy.plan.stored import decided
from matryoshkafy.plan.walk import propagate
from matryoshkafy.rewrite.graphs import Graphs
from matryoshkafy.sizes import Rungs

CHOICES = {
    "nesting": ("masked", "sliced"),
    "scope": ("full", "ffn", "output"),
    "norm": ("block", "prefix"),
}


@dataclass(frozen=True)
class Wishes:
    """The options that inspect and convert have in common, as a person gave them."""

    sizes: Rungs | None
    multiple_of: int
    nesting: str | None
    scope: str
    norm: str
    keep: Sequence[str]
    free: Sequence[str]
    overrides: Mapping[str, Sequence[int]] | None

    def asked_of(self, model: nn.Module) -> Asked:
        """Return what they ask of the analysis of a model; raises `PlanError` for strange words."""
        nesting, why = nesting_of(self.nesting, self.scope, model)
        for name, value in (("nesting", nesting), ("scope", self.scope), ("norm", self.norm)):
            if value not in CHOICES[name]:
                raise PlanError(
                    f"{name}={value!r} was given; expected one of {', '.join(CHOICES[name])}"
                )
        if self.scope == "ffn" and nesting == "masked":
            raise PlanError(
                'scope="ffn" nests hidden axes only, so each size is a pass of its own; '
                'give nesting="sliced" with it'
            )
        options = Options(nesting, self.scope, self.norm, _listed(self.keep))
        widths = {name: w for name, w in (self.overrides or {}).items() if name != "inputs"}
        return Asked(Request(options, self.sizes, widths, self.multiple_of), self._freed(), why)

    def _freed(self) -> tuple[str, ...]:
        """The inputs that nest; they stood among the overrides until version 0.2."""
        old = [str(name) for name in (self.overrides or {}).get("inputs", ())]
        if old:
            warnings.warn(
                f'overrides={{"inputs": ...}} becomes free={old!r} and will be gone in the next '
                "version",
                DeprecationWarning,
                stacklevel=4,
            )
        return (*_listed(self.free), *old)

    def refuse_beside_a_plan(self) -> None:
        """A plan holds every decision: an option beside it would be ignored."""
        usual = (self.scope, self.norm) == ("full", "block")
        more = self.nesting or self.keep or self.free or self.overrides
        if self.sizes is not None or not usual or more:
            raise PlanError(
                "a plan was given together with sizes, nesting, scope, norm, keep, free or "
                "overrides; the plan holds them already. Give them to inspect, or edit the plan "
                "(plan.with_widths), and convert with the plan alone."
            )


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True)
class Asked:
    """What is asked of the analysis, the inputs that nest, and why the nesting was chosen."""

    request: Request
    free: tuple[str, ...]
    why: str

    def plan(self, found: Trace) -> Plan:
        """Return the plan of a traced model."""
        if self.request.options.scope == "output":
            return remarked(output_plan(found, self.request), self.why)
        holes = tuple(_placeholders(found, self.free))
        return remarked(solve(found, propagate(found, holes), self.request), self.why)


def inspect(  # noqa: PLR0913  the public signature
    model: nn.Module,
    args: object = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    sizes: Rungs | None = None,
    multiple_of: int = 1,
    nesting: str | None = None,
    scope: str = "full",
    norm: str = "block",
    keep: Sequence[str] = (),
    free: Sequence[str] = (),
    overrides: Mapping[str, Sequence[int]] | None = None,
    method: str = "forward",
) -> Plan:
    """Return the plan of a model: which axes are widths. Nothing is changed.

    Args:
        model: any module that `torch.export` traces.
        args: example inputs: a tensor, a sequence of positional ones, or a mapping by name, such
            as a tokenizer returns. They are made where the model is of transformers,
            sentence-transformers or timm and none are given.
        kwargs: further example inputs by name.
        sizes: a ladder such as "64..1024", [64, 256] or [0.25, 1.0]; by default a quarter, a half
            and all of the model's width.
        multiple_of: every width is rounded up to a multiple of it (64 for hardware, the size of a
            head for configurations); a remark says which sizes moved.
        nesting: "masked" (one full pass holds every size; for training from scratch or
            fine-tuning) or "sliced" (the full model keeps its function; one pass per size).
            By default masked; sliced for scope "ffn" and where a library loaded trained
            weights, which the plan says.
        scope: "full", "ffn" or "output".
        norm: "block" or "prefix", the statistics of norms in masked nesting.
        keep: patterns of parameter or module names that stay whole, or "scalar:model.py:31"
            (the user's line, as the plan prints it) for a constant.
        free: names of inputs whose last axis nests with the model's.
        overrides: {name of a group: its widths, one for each size}.
        method: which of the model's methods is converted.

    Returns:
        The plan: print it, edit it (`plan.with_widths`), give it to `convert`.

    Raises:
        TraceError: the model cannot be traced (with the user's line).
        NothingNests: no axis of the model is a width.
        PlanError: an option does not fit the model.
        SizesError: the ladder does not end at the model's width.
    """
    call = call_of(model, args, kwargs, method)
    wishes = Wishes(sizes, multiple_of, nesting, scope, norm, keep, free, overrides)
    return wishes.asked_of(model).plan(_traced(call, check=True))


def convert(  # noqa: PLR0913  the public signature
    model: nn.Module,
    args: object = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    sizes: Rungs | None = None,
    multiple_of: int = 1,
    nesting: str | None = None,
    scope: str = "full",
    norm: str = "block",
    keep: Sequence[str] = (),
    free: Sequence[str] = (),
    overrides: Mapping[str, Sequence[int]] | None = None,
    method: str = "forward",
    plan: Plan | None = None,
    check: bool = True,
) -> Doll:
    """Return the model as a matryoshka doll that shares its parameters.

    Args:
        model: any module that `torch.export` traces.
        args: example inputs, as for `inspect`; so are the options up to `method`.
        kwargs: further example inputs by name.
        sizes: the ladder.
        multiple_of: every width is rounded up to a multiple of it, whole heads kept whole.
        nesting: "masked" or "sliced".
        scope: "full", "ffn" or "output".
        norm: "block" or "prefix".
        keep: patterns of names that stay whole.
        free: names of inputs that nest.
        overrides: {name of a group: its widths}.
        method: which of the model's methods becomes the doll's forward.
        plan: what `inspect` returned for this model, perhaps edited; in place of the options.
        check: whether the example is computed once more, to see that the doll keeps its laws.

    Returns:
        The doll: call it as the model, `outputs` gives every size.

    Raises:
        TraceError: the model cannot be traced (with the user's line).
        NothingNests: no axis of the model is a width.
        PlanError: an option or the plan does not fit the model.
        SizesError: the ladder does not end at the model's width.
    """
    call = call_of(model, args, kwargs, method)
    wishes = Wishes(sizes, multiple_of, nesting, scope, norm, keep, free, overrides)
    if plan is not None:
        wishes.refuse_beside_a_plan()
    asked = wishes.asked_of(model)
    with uncollected():
        found = _traced(call, check=check)
        plan = asked.plan(found) if plan is None else _fit(plan, found)
        own = plain_attributes(model)
        doll = checked(found, plan, call, own) if check else Doll(found, plan, own)
        say_how_far_off(doll, call)
    return doll


def checked(
    found: Trace, plan: Plan, call: Call, attributes: Mapping[str, object] | None = None
) -> Doll:
    """Return the doll of a trace and a plan; raises where it breaks a law on its example."""
    found, plan = with_levels(found, plan, call)
    doll = Doll(found, plan, attributes)
    _refuse_specialised(doll, call)
    _refuse_broken(doll, call, Graphs(found, plan))
    return doll


def _fit(plan: Plan, found: Trace) -> Plan:
    """Refuse the plan of another model."""
    state = {name: tuple(t.shape) for name, t in found.state().items()}
    held = {n: tuple(map(dims.size, shape)) for n, shape in plan.parameters.items()}
    wrong = sorted(n for n, shape in held.items() if shape != state.get(n))
    missing = plan.nodes.keys() - {n.name for n in found.graph.nodes}
    if wrong or missing:
        what = f"parameter {wrong[0]!r}" if wrong else f"value {min(missing)!r}"
        raise PlanError(
            f"the plan does not fit this model: {what} is not as in the plan. Give the plan that "
            "inspect returned for this very model and these inputs."
        )
    return plan if plan.stored else decided(found, plan)


def _traced(call: Call, *, check: bool) -> Trace:
    with caches_off(call.model):
        found = traced(call.model, call.args, call.kwargs, check=check)
        return with_defaults(found, call.model, call.kwargs)


def _refuse_specialised(doll: Doll, call: Call) -> None:
    """One path of a branching forward must keep the laws on its example."""
    if not _path_of(doll):
        return
    check_sizes(Graphs(trace_of(doll), doll.plan))
    failure = _failure(doll, call)
    unsaid(doll)
    if failure:
        raise _one_path(doll, failure)


def _refuse_broken(doll: Doll, call: Call, graphs: Graphs) -> None:
    try:
        refuse_broken(doll, call, graphs)
    except PlanError as error:
        if _path_of(doll):
            raise _one_path(doll, str(error).partition(f". {REMEDY}")[0]) from error
        raise


def _path_of(doll: Doll) -> str:
    """Return the note that one path of a branching forward was recorded, "" where none was."""
    return next((n for n in trace_of(doll).notes if n.startswith(SPECIALISED)), "")


def _one_path(doll: Doll, failure: str) -> TraceError:
    reason = _path_of(doll).removeprefix(f"{SPECIALISED}the forward ").partition(";")[0]
    return TraceError(
        f"the path that the example takes cannot be taken at every size:\n{failure}\n"
        f"The forward {reason}; which rows it works on depends on values that differ between "
        "the sizes. Rewrite that part with masks of a fixed shape (torch.where, one product "
        "over all experts)."
    )


def _failure(doll: Doll, call: Call) -> str | None:
    """Return which law fails on the example, or what stops a size; None if all is well."""
    try:
        with silent():
            report = verify(doll, call.args, call.kwargs)
    except (RuntimeError, IndexError, GuardError) as error:
        return first_line(error)
    return None if report.passed else str(report)


def _placeholders(found: Trace, free: Sequence[str]) -> Iterator[str]:
    """Yield the graph's names of the inputs that a person names as the forward does."""
    named = input_names(found)
    for name in free:
        if name not in named.values():
            inputs = ", ".join(item.name for item in found.signature.inputs)
            raise PlanError(f"free={list(free)} was given; the inputs are {inputs}")
        yield from (hole for hole, given in named.items() if given == name)
