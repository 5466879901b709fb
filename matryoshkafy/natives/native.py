"""native(): a slice as the user's own class at the configuration that fits it."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.slice import parts_of, state_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.graph.quiet import silent
from matryoshkafy.graph.trace import tensors_of
from matryoshkafy.natives.huggingface import untied
from matryoshkafy.natives.inputs import Call, fresh_calls, outputs
from matryoshkafy.natives.like import recipe_of
from matryoshkafy.natives.recipe import NativeError, Recipe, tables_of
from matryoshkafy.natives.search import Space, Wanted, assignments, counted, families, heads
from matryoshkafy.natives.tree import Changes, Field, named
from matryoshkafy.plan.plan import Plan

TOLERANCE = 1e-5
MOST_TRIES = 160


class NativeWarning(UserWarning):
    """A part of a native model that the traced path does not read, so nothing checks it."""


@dataclass(frozen=True)
class Native:
    """A slice in the user's own class: the module, which fields changed, how well it agrees.

    Args:
        module: of the user's class.
        recipe: how it was built.
        changes: {field of the configuration: its new value}.
        error: worst relative difference to the slice in float32.
        tables: hidden buffers that the class makes from its width and that were taken from the
            slice instead.
        unread: parameters that no check covers.
    """

    module: nn.Module
    recipe: Recipe
    changes: Mapping[Field, Any]
    error: float
    tables: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def native(
    small: nn.Module, *, like: object, tables: bool = False, inputs: Call | None = None
) -> nn.Module:
    """Return a slice as the user's own class at a smaller configuration, equal to the slice.

    Which fields of the configuration shrink is found: one is changed at a time and the shapes that
    move are compared with the slice's. The weights are loaded and both models are compared in
    float32 on fresh inputs of two shapes, to a relative error of 1e-5.

    Args:
        small: what `slice` returned, or `load(folder, size=m)`.
        like: the model that was converted; or what builds it, with the values of its arguments:
            `functools.partial(Net, width=256, heads=8)`.
        tables: whether hidden tables that the class makes from its own width (sinusoids) may be
            taken from the slice, where they differ; the class's own loader would not keep them.
        inputs: (args, kwargs) to compare on, where random ones of the traced shapes do not run:
            boxes, places of pictures in a text. Their floats are drawn anew.

    Returns:
        A module of the class of `like`, in evaluation mode. It owns its memory.

    Raises:
        NativeError: where no configuration gives the slice; it names the tensors, their group and
            what to do.
    """
    found = find(small, like, tables=tables, inputs=inputs)
    if found.unread:
        warnings.warn(unchecked(found.unread), NativeWarning, stacklevel=2)
    return found.module


def find(  # noqa: PLR0913  all that can be said of a comparison
    small: nn.Module,
    like: object,
    *,
    tables: bool = False,
    inputs: Call | None = None,
    spare: Callable[[], Mapping[str, Tensor]] | None = None,
    shared: bool = False,
) -> Native:
    """Return the native model of a slice with all that is known of it; see `native`.

    tables: take hidden tables that the class makes from its width out of the slice; spare: gives
    the full model's tensors, for those that the traced path does not read; shared: the module
    holds the slice's own weights rather than copies.
    """
    _, plan = parts_of(small)
    if plan.options.scope == "output" and plan.sizes[-1] < plan.width:
        raise NativeError(
            f'size {plan.sizes[-1]} of scope="output" was given; expected the largest, '
            f"{plan.width}: the smaller ones are its first units, and no configuration says so. "
            "Save the largest, or the model itself, and cut what it returns "
            "(SentenceTransformer(folder, truncate_dim=n))."
        )
    recipe = untied(recipe_of(like), state_of(small))
    space = Space(recipe, _wanted(small, plan))
    if not space.base:
        raise NativeError(
            f"{recipe.name} cannot be built from its configuration alone; expected a class that "
            "is made without its weights. Give like=functools.partial(...) of a function that "
            "builds it."
        )
    with silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = _as_float32(small)
        expected = tuple((call, outputs(exact, call)) for call in fresh_calls(exact, inputs))
        behind = spare or (lambda: {} if recipe.source is None else tensors_of(recipe.source))
        check = Check(exact, expected, tables, behind, shared)
        found, reason = _first(space, check)
    if found is None:
        raise NativeError(_refusal(space, plan, reason))
    return found


def _wanted(small: nn.Module, plan: Plan) -> Wanted:
    shapes = {name: tuple(t.shape) for name, t in state_of(small).items()}
    pairs = zip(plan.groups, plan.ladder[-1], strict=True)
    widths: dict[float, int] = {g.size: width for g, width in pairs if width < g.size}
    return Wanted(shapes, widths, plan.sizes[-1] / plan.width)


@dataclass(frozen=True)
class Check:
    """A slice in float32 and the question whether a module computes the same; see `find`.

    expected: fresh inputs of two shapes, with what the slice makes of them.
    """

    small: nn.Module
    expected: tuple[tuple[Call, Any], ...]
    tables: bool
    spare: Callable[[], Mapping[str, Tensor]]
    shared: bool = False

    def error(self, module: nn.Module) -> float:
        """Return the worst relative difference over fresh inputs; inf where a call fails."""
        worst = 0.0
        for call, wanted in self.expected:
            try:
                worst = max(worst, relative_error(outputs(module, call), wanted))
            except Exception:  # noqa: BLE001  the user's forward may raise anything
                return float("inf")
            if not worst <= TOLERANCE:
                return worst
        return worst


def _as_float32(small: nn.Module) -> nn.Module:
    kinds = {t.dtype for t in small.state_dict().values() if t.is_floating_point()}
    return small.eval() if kinds <= {torch.float32, torch.float64} else copy.deepcopy(small).float()


def _first(space: Space, check: Check) -> tuple[Native | None, str]:
    """Return the first configuration that computes the slice, without a change too many."""
    reason, seen = "shapes", set[frozenset[object]]()
    for shaped in assignments(space):
        for extra in _quiet_changes(space, shaped):
            changes = {**shaped, **extra}
            if frozenset(changes.items()) in seen:
                continue
            seen.add(frozenset(changes.items()))
            made = _made(space, changes, check)
            if made is not None and made.error <= TOLERANCE:
                return _leanest(space, check, made), ""
            if made is not None and reason != "values":
                reason = "values" if math.isfinite(made.error) else "calls"
            if len(seen) == MOST_TRIES:
                return None, reason
    return None, reason


def _quiet_changes(space: Space, shaped: Mapping[Field, object]) -> Iterator[dict[Field, Any]]:
    """Yield changes of fields that move no shape: all counts of heads, none, some, then scales.

    Counts that stand in one list are changed together, and those that only together move none.
    """
    every = {f: v for f, v in heads(space).items() if f not in shaped}
    counts = {f: v for f, v in every.items() if f in space.quiet}
    fields = list(counts)
    yield from (every, counts, {})
    yield from families(counts)
    yield from counted(space, shaped)
    for number in (1, len(fields) - 1, 2, len(fields) - 2):
        if 0 < number < len(fields):
            for some in itertools.combinations(fields, number):
                yield {f: counts[f] for f in some}
    for field in space.quiet:
        scaled = space.fields[field] * space.wanted.ratio
        whole = isinstance(space.fields[field], float) or scaled == int(scaled)
        if whole and field not in shaped and field not in counts:
            alone = {field: type(space.fields[field])(scaled)}
            yield from ({**counts, **alone}, alone) if counts else (alone,)


def _made(space: Space, changes: Mapping[Field, object], check: Check) -> Native | None:
    """Build, load and compare; None where the class refuses the configuration."""
    if not space.fits(changes):
        return None
    try:
        module, unread = _filled(space.recipe, changes, check)
    except Exception:  # noqa: BLE001  a constructor may raise anything
        return None
    made = Native(module, space.recipe, changes, check.error(module), (), unread)
    if made.error <= TOLERANCE or not check.tables:
        return made
    taken = take_tables(module, check.small)
    return Native(module, space.recipe, changes, check.error(module), taken, unread)


def _filled(recipe: Recipe, changes: Changes, check: Check) -> tuple[nn.Module, tuple[str, ...]]:
    """Build without memory for parameters and give each its value; with memory, where one fails."""
    state = state_of(check.small)
    try:
        module = recipe.build(changes, hollow=True)
        unread = load_slice(module, state, check.spare, shared=check.shared)
        if not any(t.is_meta for t in tensors_of(module).values()):
            return module, unread
    except Exception:  # noqa: BLE001  a constructor that reads its weights, a tensor that is watched
        pass
    module = recipe.build(changes)
    return module, load_slice(module, state, check.spare, shared=check.shared)


def _leanest(space: Space, check: Check, made: Native) -> Native:
    """Take back each change without which the model is the same: it was a coincidence."""
    for field in made.changes:
        fewer = {f: v for f, v in made.changes.items() if f != field}
        other = _made(space, fewer, check)
        # Not worse, rather than within the tolerance: heads hardly matter where attention is flat.
        if other is not None and other.error <= made.error:
            return _leanest(space, check, other)
    return made


def load_slice(
    module: nn.Module,
    state: Mapping[str, Tensor],
    spare: Callable[[], Mapping[str, Tensor]],
    *,
    shared: bool = False,
) -> tuple[str, ...]:
    """Put a slice's tensors into a native module; return the parameters that it has no value for.

    Those are cut from the full model's: the traced path does not read them. shared: no copies.
    """
    hidden = tensors_of(module).keys() - module.state_dict().keys()
    filled: set[int] = set()
    left: dict[str, Tensor] = {}
    for name, tensor in tensors_of(module).items():
        given = state.get(name)
        if given is not None and given.shape == tensor.shape and name not in hidden:
            if id(tensor) not in filled:
                _put(tensor, given, shared=shared)
            filled.add(id(tensor))
        elif isinstance(tensor, nn.Parameter):
            left[name] = tensor
    left = {name: t for name, t in left.items() if id(t) not in filled}
    full: Mapping[str, Tensor] = spare() if left else {}
    for name, tensor in left.items():
        if name in full and full[name].dim() == tensor.dim():
            _put(tensor, full[name][tuple(slice(n) for n in tensor.shape)])
    return tuple(left)


def _put(tensor: Tensor, value: Tensor, *, shared: bool = False) -> None:
    """Give a tensor other values, on its device; the object stays, so that ties do."""
    device = value.device if tensor.is_meta else tensor.device
    value = value.detach().to(device, copy=not shared)
    if tensor.is_meta:
        torch.utils.swap_tensors(tensor, nn.Parameter(value, tensor.requires_grad))  # pyright: ignore[reportUnknownMemberType]
    else:
        tensor.data = value


def take_tables(module: nn.Module, small: nn.Module) -> tuple[str, ...]:
    """Replace hidden tables of a native module that differ from the slice's; return their names.

    What the state_dict does not show is made anew by the class, from its own width.
    """
    state = state_of(small)
    taken: list[str] = []
    for name, tensor in tables_of(module).items():
        given = state.get(name)
        if given is None or given.shape != tensor.shape:
            continue
        if not torch.equal(given, tensor):
            _put(tensor, given)
            taken.append(name)
    return tuple(taken)


def unchecked(names: tuple[str, ...]) -> str:
    """Return what a person must know of parameters that no comparison covers."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more}: the traced path does not read these parameters, so they "
        "are the first units of the original's and no comparison covers them. Convert with example "
        "inputs that read them, or do not use them."
    )


def _refusal(space: Space, plan: Plan, reason: str) -> str:
    """Say which tensors of which group no configuration fits, and what to do."""
    name = space.recipe.name
    if reason == "values":
        masked = (
            "Masked nesting has norms and products by level, which no stock class has: convert "
            'with nesting="sliced", or take the smallest size.'
        )
        made = (
            "Expected equal outputs to 1e-5: the class derives a table or constant from its width "
            "in a way of its own. Give tables=True where it is a table, or keep the slice as a "
            "graph."
        )
        return (
            f"{name} can be built with the shapes of size {plan.sizes[-1]}, but computes other "
            f"values than the slice. {masked if plan.masked else made}"
        )
    if reason == "calls":
        return (
            f"{name} can be built with the shapes of size {plan.sizes[-1]}, but random inputs of "
            "the traced shapes do not run through it. Expected inputs to compare on that do. Give "
            "native(..., inputs=(ARGS, KWARGS)), such as those that were traced."
        )
    if not space.fields:
        return (
            f"{name} has no number that could be a width; expected one argument for each, with a "
            "value: --class MODULE:BUILD of def build(width=256, heads=8), or "
            "like=functools.partial(build, width=256, heads=8)."
        )
    off = _unreached(space)
    shown = ", ".join(f"{p[0]} (dim {p[1]}: {w})" for p, w in off[:3]) or "no shape differs"
    groups = _groups_of([p for p, _ in off], plan)
    return (
        f"no configuration of {name} has the shapes of size {plan.sizes[-1]}: {shown}"
        f"{' in ' + groups if groups else ''}. Expected widths that its fields "
        f"({', '.join(named(f) for f in list(space.fields)[:6])}, ...) can express: whole heads, "
        "products that divide. Convert with sizes that fit (multiple_of=64, or --multiple-of 64), "
        "keep a group whole (keep=[...]), or keep the slice as a graph."
    )


def _unreached(space: Space) -> list[tuple[tuple[str, int], int]]:
    """Return the dimensions that shrink and that no field moves; all that shrink if none."""
    off = space.off(space.base)
    stuck = [p for p in off if not space.movers.get(p)] or off
    wanted = space.wanted.shapes
    return [(p, wanted[p[0]][p[1]] if p[1] < len(wanted[p[0]]) else 0) for p in sorted(stuck)]


def _groups_of(places: list[tuple[str, int]], plan: Plan) -> str:
    axes = {f"{name}:{i}" for name, i in places}
    names = {group.name for group in plan.groups if axes & set(group.parameters)}
    return "the group " + ", ".join(sorted(names)[:3]) if names else ""
