"""Plan: the frozen result of the analysis. Parameter -> axes, group -> width at each level.

The plan is the single source of truth: converting, slicing, saving and loading read it and nothing
else. It prints as a table and round-trips through JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Widths
from matryoshkafy.errors import PlanError
from matryoshkafy.plan.parts import Action as Action
from matryoshkafy.plan.parts import Group as Group
from matryoshkafy.plan.parts import Mask as Mask
from matryoshkafy.plan.parts import Masks as Masks
from matryoshkafy.plan.parts import Options as Options
from matryoshkafy.plan.parts import Scalar as Scalar
from matryoshkafy.plan.parts import Stored as Stored
from matryoshkafy.plan.parts import Unknown as Unknown
from matryoshkafy.plan.parts import Whole as Whole
from matryoshkafy.plan.stairs import Stair, steps_taken
from matryoshkafy.plan.text import table
from matryoshkafy.sizes import SizesError, one_size, width_at

PLAN_FORMAT = 3
READS = (1, 2, 3)


Shape = tuple[Dim, ...]


# What files of before the offset of a constant call units - 1.
OLDER: Mapping[str, dict[str, Any]] = {"less": {"form": "power", "power": 1.0, "offset": -1.0}}


@dataclass(frozen=True)
class Plan:
    """Which axes nest, and what every node does about it.

    Args:
        options: what the user asked for.
        sizes: the ladder, ascending.
        main: index of the main group.
        unit: what one unit of the main group spans: 1, the size of a head, or of how many equal
            parts side by side it is one each.
        groups: the groups.
        ladder: for each size, the width of every group.
        parameters: {name: its dims}.
        nodes: {node: the dims of each of its outputs}: one for a tensor, none for a number.
        notes: {node: {name: dim}}: the extra dims of a node (groups of a convolution).
        actions: {node: what masked nesting does there}.
        tail: the nodes computed once per size.
        full: the parameter-only statistics that are taken at full width before they are cut.
        whole: the axes that stay whole.
        unknown: the ops without a rule.
        scalars: the constants that follow a width.
        remarks: what else a person should know.
        masks: {node: {weight's node: its masks}}.
        stored: {name: what a sub-model keeps under it}.
        order: {group: the user's unit at each place}, where units were moved.
        blocks: the nodes of blocks that may be left out, outermost first.
        stairs: groups of widths that are nested already, which go piece by piece.
    """

    options: Options
    sizes: tuple[int, ...]
    main: int
    unit: int
    groups: tuple[Group, ...]
    ladder: tuple[Widths, ...]
    parameters: Mapping[str, tuple[Dim, ...]]
    nodes: Mapping[str, tuple[Shape, ...]]
    notes: Mapping[str, Mapping[str, Dim]] = field(default_factory=dict[str, Mapping[str, Dim]])
    actions: Mapping[str, Action] = field(default_factory=dict[str, Action])
    tail: frozenset[str] = frozenset()
    full: frozenset[str] = frozenset()
    whole: tuple[Whole, ...] = ()
    unknown: tuple[Unknown, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    remarks: tuple[str, ...] = ()
    masks: Mapping[str, Mapping[str, Masks]] = field(default_factory=dict[str, Mapping[str, Masks]])
    stored: Mapping[str, Stored] = field(default_factory=dict[str, Stored])
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    blocks: tuple[tuple[str, ...], ...] = ()
    stairs: tuple[Stair, ...] = ()

    def outputs(self, node: str) -> tuple[Shape, ...]:
        """Return the dims of each output of a node: one for a tensor, none where it is unknown."""
        return self.nodes.get(node, ())

    def dims(self, node: str) -> Shape:
        """Return the dims of the one tensor that a node gives; () where it is no single one."""
        found = self.outputs(node)
        return found[0] if len(found) == 1 else ()

    @property
    def width(self) -> int:
        """The model's width at full size: units of the main group times what each unit spans."""
        return self.width_of(tuple(g.size for g in self.groups))

    def width_of(self, widths: Widths) -> int:
        """Return the model's width where the groups have these units."""
        row = next((stair for stair in self.stairs if self.main in stair), (self.main,))
        return sum(widths[g] for g in row) * self.unit

    @property
    def levels(self) -> int:
        """How many sizes there are."""
        return len(self.sizes)

    def level(self, size: float) -> int:
        """Return the level of a size, or of a ratio of the width (a float or fraction up to 1).

        Raises `PlanError` that lists the sizes.
        """
        known = ", ".join(map(str, self.sizes))
        try:
            found = one_size(size, self.width)
        except SizesError as error:
            raise PlanError(
                f"size {size!r} was asked for; this model has the sizes {known}. {error}"
            ) from None
        if found not in self.sizes:
            given = "" if found == size else f" ({found} units)"
            raise PlanError(f"size {size}{given} was asked for; this model has the sizes {known}")
        return self.sizes.index(found)

    def with_widths(self, widths: Mapping[str, Sequence[int]]) -> Plan:
        """Return the plan with other widths of some groups.

        Args:
            widths: {name of a group: its ascending widths, one for each size; the last is the
                group's full width}.

        Raises:
            PlanError: no such group, or widths that do not fit it.
        """
        names = [g.name for g in self.groups]
        ladder = [list(w) for w in self.ladder]
        for name, given in widths.items():
            if name not in names:
                raise PlanError(
                    f"overrides name the group {name!r}; the groups are {', '.join(names)}"
                )
            index = names.index(name)
            _check_widths(name, given, self.groups[index].size, self.levels)
            for level, value in enumerate(given):
                ladder[level][index] = int(value)
        return replace(self, ladder=tuple(map(tuple, ladder)))

    def shape_at(self, name: str, level: int) -> tuple[int, ...]:
        """Return the shape of a parameter at a level."""
        return tuple(dims.size_at(dim, self.ladder[level]) for dim in self.parameters[name])

    def up_to(self, level: int) -> Plan:
        """Return the plan of the sub-model at a level: the same ladder, ending there."""
        sizes, ladder = self.sizes[: level + 1], self.ladder[: level + 1]
        if not self.stairs:
            return replace(self, sizes=sizes, ladder=ladder)
        stored = {n: s for n, s in self.stored.items() if not self.is_gone(s.dims, level)}
        return replace(self, sizes=sizes, ladder=ladder, stored=stored)

    def is_gone(self, shape: Iterable[Dim], level: int) -> bool:
        """Tell whether a tensor has no units at a level: it is a later piece of a stair."""
        widths = self.ladder[level]
        return bool(self.stairs) and any(dims.size_at(dim, widths) == 0 for dim in shape)

    @cached_property
    def masked(self) -> bool:
        """Whether one full pass holds every size."""
        return self.options.nesting == "masked"

    def __str__(self) -> str:
        return table(self)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(plan_to_dict(self), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan that `to_json` wrote; raises `PlanError` for anything else."""
        try:
            return plan_from_dict(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"this is no plan of matryoshkafy ({error}); the file is damaged"
            ) from error


def _check_widths(name: str, widths: Sequence[int], size: int, levels: int) -> None:
    ok = len(widths) == levels and list(widths) == sorted(widths)
    if not ok or widths[0] < 1 or widths[-1] != size:
        raise PlanError(
            f"overrides[{name!r}] = {widths!r}; expected {levels} ascending widths from at least 1 "
            f"to {size}, one for each size"
        )


def ladder_of(groups: tuple[Group, ...], sizes: tuple[int, ...], width: int) -> tuple[Widths, ...]:
    """Return the width of every group at every level: the ratio m / D, rounded up, at least 1."""
    return tuple(tuple(width_at(g.size, size, width) for g in groups) for size in sizes)


def on_stairs(plan: Plan, stairs: tuple[Stair, ...]) -> Plan:
    """Return the plan with the widths that are nested already: whole pieces, one after another."""
    plan, full = replace(plan, stairs=stairs), tuple(g.size for g in plan.groups)
    ladder = [
        dict(enumerate(widths))
        | {g: n for stair in stairs for g, n in steps_taken(stair, full, size, plan.width)}
        for size, widths in zip(plan.sizes, plan.ladder, strict=True)
    ]
    return replace(plan, ladder=tuple(tuple(widths.values()) for widths in ladder))


def _outputs_from_json(saved: Any, version: int) -> tuple[Shape, ...]:
    """Formats 1 and 2 have the dims of one tensor as they are, and a word before several.

    They write a number as they write a tensor without dims: neither has a size.
    """
    if version < 3:
        one = {"many": [saved]}
        several = cast("Mapping[str, Any]", saved) if isinstance(saved, Mapping) else one
        saved = several["many"]
    return tuple(tuple(map(dims.from_json, shape)) for shape in saved)


def plan_to_dict(plan: Plan) -> dict[str, object]:
    """Return the plan as plain JSON values."""
    return {
        "format": PLAN_FORMAT,
        "options": asdict(plan.options),
        "sizes": list(plan.sizes),
        "main": plan.main,
        "unit": plan.unit,
        "groups": [asdict(g) for g in plan.groups],
        "ladder": [list(w) for w in plan.ladder],
        "parameters": {k: [dims.to_json(d) for d in v] for k, v in plan.parameters.items()},
        "nodes": {
            k: [[dims.to_json(d) for d in shape] for shape in v] for k, v in plan.nodes.items()
        },
        "notes": {k: {n: dims.to_json(d) for n, d in v.items()} for k, v in plan.notes.items()},
        "actions": {k: [a.kind, *a.groups] for k, a in plan.actions.items()},
        "tail": sorted(plan.tail),
        "full": sorted(plan.full),
        "whole": [asdict(w) for w in plan.whole],
        "unknown": [asdict(u) for u in plan.unknown],
        "scalars": [asdict(s) for s in plan.scalars],
        "remarks": list(plan.remarks),
        "masks": {
            node: {w: [[m.out, m.into] for m in masks] for w, masks in weights.items()}
            for node, weights in plan.masks.items()
        },
        "stored": {name: s.to_json() for name, s in plan.stored.items()},
        "order": {group: list(units) for group, units in plan.order.items()},
        "blocks": [list(nodes) for nodes in plan.blocks],
        **({"stairs": [list(groups) for groups in plan.stairs]} if plan.stairs else {}),
    }


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """Read a plan from JSON values; raises `PlanError` where they do not fit together.

    Format 1 has neither masks nor what is stored: `decided` adds them where the graph is at hand.
    """
    if data.get("format") not in READS:
        raise PlanError(
            f"the plan has format {data.get('format')!r}, this version reads "
            f"{' and '.join(map(str, READS))}; upgrade matryoshkafy"
        )
    plan = Plan(
        options=_options(data["options"]),
        sizes=tuple(data["sizes"]),
        main=data["main"],
        unit=data["unit"],
        groups=tuple(Group(g["name"], g["size"], tuple(g["parameters"])) for g in data["groups"]),
        ladder=tuple(tuple(w) for w in data["ladder"]),
        parameters={k: tuple(dims.from_json(d) for d in v) for k, v in data["parameters"].items()},
        nodes={k: _outputs_from_json(v, data["format"]) for k, v in data["nodes"].items()},
        notes={k: {n: dims.from_json(d) for n, d in v.items()} for k, v in data["notes"].items()},
        actions={k: Action(v[0], tuple(v[1:])) for k, v in data["actions"].items()},
        tail=frozenset(data["tail"]),
        full=frozenset(data["full"]),
        whole=tuple(Whole(**w) for w in data["whole"]),
        unknown=tuple(Unknown(**u) for u in data["unknown"]),
        scalars=tuple(Scalar(**(s | OLDER.get(s.get("form", ""), {}))) for s in data["scalars"]),
        remarks=tuple(data["remarks"]),
        masks={
            node: {w: tuple(Mask(*m) for m in masks) for w, masks in weights.items()}
            for node, weights in data.get("masks", {}).items()
        },
        stored={k: Stored.from_json(v) for k, v in data.get("stored", {}).items()},
        order={k: tuple(v) for k, v in data.get("order", {}).items()},
        blocks=tuple(map(tuple, data.get("blocks", ()))),
        stairs=tuple(map(tuple, data.get("stairs", ()))),
    )
    _check(plan)
    return plan


def _options(saved: Mapping[str, Any]) -> Options:
    return Options(saved["nesting"], saved["scope"], saved["norm"], tuple(saved["keep"]))


def _check(plan: Plan) -> None:
    """Refuse a plan whose parts contradict each other: it would slice out of bounds."""
    counts = [g.size for g in plan.groups]
    ascending = all(a < b for a, b in zip(plan.sizes, plan.sizes[1:], strict=False))
    if not plan.sizes or not ascending or len(plan.ladder) != len(plan.sizes):
        raise PlanError("the plan's sizes do not ascend or miss their widths; the file is damaged")
    if not 0 <= plan.main < len(counts):
        raise PlanError("the plan's main group is missing; the file is damaged")
    steps = [g for stair in plan.stairs for g in stair]
    if len(set(steps)) != len(steps) or not set(steps) <= set(range(len(counts))):
        raise PlanError("the plan's stairs name groups twice, or that are missing")
    least = [int(all(g not in stair[1:] for stair in plan.stairs)) for g in range(len(counts))]
    for widths in plan.ladder:
        if len(widths) != len(counts) or any(
            not low <= w <= n for low, w, n in zip(least, widths, counts, strict=True)
        ):
            raise PlanError("the plan's widths are out of bounds; the file is damaged")
    for name, axes in plan.parameters.items():
        for dim in axes:
            if any(g >= len(counts) for g in dims.groups_of(dim)):
                raise PlanError(f"parameter {name!r} names a group that is missing")
    _check_stored(plan, len(counts))
    _check_order(plan)


def _check_stored(plan: Plan, groups: int) -> None:
    for name, kept in plan.stored.items():
        if any(g >= groups for dim in kept.dims for g in dims.groups_of(dim)):
            raise PlanError(f"what is stored as {name!r} names a group that is missing")
        if kept.mask is not None and not _fits(kept.mask, len(kept.dims)):
            raise PlanError(f"{name!r} is masked over dims that it has not; the file is damaged")
        if kept.scalar is not None and not (0 <= kept.scalar.group < groups and len(kept.dims) < 2):
            raise PlanError(f"{name!r} is no number that follows a width; the file is damaged")


def _fits(mask: Mask, rank: int) -> bool:
    return all(type(d) is int and 0 <= d < rank for d in (mask.out, mask.into))


def _check_order(plan: Plan) -> None:
    sizes = {g.name: g.size for g in plan.groups}
    for name, units in plan.order.items():
        if sorted(units) != list(range(sizes.get(name, -1))):
            raise PlanError(
                f"the order of group {name!r} is no permutation of its {sizes.get(name, 0)} units; "
                "the file is damaged"
            )
