"""The progressive layout: a file per level, which holds only what that level adds.

    level-0.safetensors   the tensors of the smallest size
    level-1.safetensors   what the next size adds to them, and so on

A tensor's new part at a level is an L, a corner or a shell: it is stored as boxes, one for each dim
along which the tensor grows. Structural zeros of masked nesting are boxes too, and not stored, so
that all files together are smaller than the model. A device with size 192 fetches one more file to
have 288; whatever else becomes of that file, the sizes below it do not read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Segments
from matryoshkafy.dolls.cuts import Cut, completed
from matryoshkafy.files.header import CODES, DTYPES, PAIRS, Entry
from matryoshkafy.files.held import Held
from matryoshkafy.files.json_text import is_list, shown
from matryoshkafy.files.records import (
    CheckpointError,
    Record,
    as_parameter,
    hollow,
    shared,
    sparse_from,
)
from matryoshkafy.files.tensors import OpenFiles, write_tensors
from matryoshkafy.graph.nodes import TensorInfo
from matryoshkafy.plan.plan import Mask, Plan

BYTES = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}

Place = tuple[Segments, ...]
Read = Callable[[str, Place | None], Tensor]


def level_file(level: int) -> str:
    """Return the name of the file of a level."""
    return f"level-{level}.safetensors"


@dataclass(frozen=True)
class _Box:
    """A part of a tensor that a level adds: the indices along each dim, at full width.

    dim: the dim along which the tensor grows; -1 for a tensor that is stored in one piece.
    """

    dim: int
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """How many indices there are along each dim."""
        return tuple(map(_count, self.place))


@dataclass(frozen=True)
class Part:
    """A tensor that is stored: under its first name, with its dims in the plan.

    dims: None where no sub-model reads it; then the last level holds it whole. parts: the names of
    a sparse tensor's parts.
    """

    name: str
    info: TensorInfo
    dims: tuple[Dim, ...] | None
    mask: Mask | None = None

    def kept(self, plan: Plan, level: int) -> Place:
        """Return the indices along each dim that a level keeps, of those that were saved."""
        if level < 0 or (self.dims is None and level < plan.levels - 1):
            return tuple(() for _ in self.info.shape)
        if self.dims is None:
            return tuple(((0, n),) for n in self.info.shape)
        have, want = plan.ladder[-1], plan.ladder[level]
        found = (dims.relative(dim, have, want) for dim in self.dims)
        pairs = zip(found, self.info.shape, strict=True)
        return tuple(((0, n),) if segments is None else segments for segments, n in pairs)

    def boxes(self, plan: Plan, level: int) -> Iterator[_Box]:
        """Yield what a level adds, without what is zero by the masks, and without empty boxes."""
        before, after = self.kept(plan, level - 1), self.kept(plan, level)
        rank = len(after)
        order = [d for d in self._order(rank) if before[d] != after[d]]
        if rank == 0 and level == (plan.levels - 1 if self.dims is None else 0):
            yield _Box(-1, ())
        for i, dim in enumerate(order):
            if level and self.mask is not None and dim == self.mask.into:
                continue  # read by outputs of lower levels alone, if by any: zeros
            place = list(after)
            place[dim] = dims.minus(after[dim], before[dim])
            for earlier in order[:i]:
                place[earlier] = before[earlier]
            box = _Box(-1 if self._whole(plan) else dim, tuple(place))
            if math.prod(box.shape):
                yield box

    def _order(self, rank: int) -> list[int]:
        """The output dim of a mask first: what it leaves to the input dim is zero."""
        first = [] if self.mask is None else [self.mask.out]
        return first + [d for d in range(rank) if d not in first]

    def _whole(self, plan: Plan) -> bool:
        return self.kept(plan, 0) == self.kept(plan, plan.levels - 1) or self.dims is None

    def entry(self, box: _Box) -> str:
        """Return the name of a box in its file; no tensor of a model is called so."""
        return self.name if box.dim < 0 else f"{self.name}#{box.dim}"


def _count(segments: Segments) -> int:
    return sum(b - a for a, b in segments)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of levels stores: its parts, and further names of tied tensors."""

    plan: Plan
    parts: Mapping[str, Part]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def files(self) -> list[str]:
        """The names of the files, ascending by level."""
        return [level_file(level) for level in range(self.plan.levels)]

    def to_json(self) -> dict[str, object]:
        """Return what the plan does not say: shapes, types and ties."""
        infos = {
            name: [CODES.get(part.info.dtype, str(part.info.dtype)[6:]), list(part.info.shape)]
            for name, part in self.parts.items()
        }
        return {"tensors": infos, "aliases": dict(self.aliases)}


def layout_of(plan: Plan, infos: Mapping[str, TensorInfo], aliases: Mapping[str, str]) -> Layout:
    """Return the layout of tensors by their first names.

    Args:
        plan: what sub-models store of them.
        infos: shape and dtype by first name; of sparse tensors, of their parts.
        aliases: {further name: first name}.
    """
    parts: dict[str, Part] = {}
    for name, info in infos.items():
        names = [name, *(alias for alias, owner in aliases.items() if owner == name)]
        stored = [plan.stored[n] for n in names if n in plan.stored]
        masks = {kept.mask for kept in stored}
        mask = next(iter(masks)) if len(masks) == 1 else None
        shape = stored[0].dims if stored else None
        if ":" in name and shape is None:
            shape = tuple((n,) for n in info.shape)  # of a sparse tensor, which no size cuts
        parts[name] = Part(name, info, shape, mask)
    return Layout(plan, parts, aliases)


def layout_from_json(saved: Any, plan: Plan, records: Sequence[Record]) -> Layout:
    """Return the layout that `to_json` wrote; raises CheckpointError for anything else."""
    names = {part for record in records for part in record.parts}
    aliases: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    try:
        aliases = {str(k): str(v) for k, v in saved["aliases"].items()}
        infos = {str(k): _info(*v) for k, v in saved["tensors"].items()}
        sound = infos.keys() | aliases.keys() == names and set(aliases.values()) <= infos.keys()
        sound = sound and not infos.keys() & aliases.keys()
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"the layout of the levels is {shown(saved)}, which does not fit the tensors that the "
            "checkpoint lists. The file is damaged: copy it again, or pack the model again."
        )
    return layout_of(plan, infos, aliases)


def _info(code: str, shape: object) -> TensorInfo:
    if not is_list(shape) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(shape)
    return TensorInfo(tuple(shape), {**DTYPES, **PAIRS}[code])


def level_writers(layout: Layout, read: Read) -> dict[str, Callable[[Path], None]]:
    """Return how the file of each level is written.

    read: returns the part of a tensor with given indices along each dim; None: all of it.
    """
    return {level_file(k): partial(_write, layout, read, k) for k in range(layout.plan.levels)}


def _write(layout: Layout, read: Read, level: int, path: Path) -> None:
    entries = [
        Entry(part.entry(box), box.shape, part.info.dtype, partial(_supply, read, part, box))
        for part in layout.parts.values()
        for box in part.boxes(layout.plan, level)
    ]
    write_tensors(path, entries)


def _supply(read: Read, part: Part, box: _Box) -> Tensor:
    whole = box.shape == part.info.shape
    return read(part.name, None if whole else box.place)


class Levels(OpenFiles):
    """The open files of the levels first to last.

    base: {first name: what the level before `first` keeps}, so that the files of the levels below
    are not read; None where first is 0.
    """

    def __init__(
        self,
        held: Held,
        records: Sequence[Record],
        layout: Layout,
        levels: range,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._records = {record.name: record for record in records}
        self._layout, self._levels, self._base = layout, levels, base
        super().__init__(held, map(level_file, levels))

    def owner(self, name: str) -> Any:
        """Return what names of one tensor share."""
        return self._layout.aliases.get(name, name)

    def outline(self) -> dict[str, Tensor]:
        """Return every tensor on the meta device: shapes, dtypes and ties, without values."""
        return outline_of(self._layout, self._records.values())

    def whole(self, name: str) -> Tensor:
        """Return a tensor as it was saved, with zeros where masks say so."""
        return self._made(name)

    def cut(self, cut: Cut, *, zeros: bool) -> Tensor:
        """Return what the last of the levels keeps of a tensor."""
        tensor = self._made(cut.name).detach()
        return completed(tensor, cut) if zeros else tensor

    def _made(self, name: str) -> Tensor:
        record = self._records[name]
        if record.sparse and self._base is not None:
            return self._base[name]
        if record.sparse:
            return sparse_from(record, [self._assembled(part) for part in record.parts])
        return as_parameter(self._assembled(self.owner(name)), record)

    def _assembled(self, owner: str) -> Tensor:
        part, plan = self._layout.parts[owner], self._layout.plan
        outer = part.kept(plan, self._levels[-1])
        out = torch.zeros(tuple(map(_count, outer)), dtype=part.info.dtype)
        if self._base is not None:
            _put(out, self._base[owner], part.kept(plan, self._levels[0] - 1), outer)
        for level, file in zip(self._levels, self._files.values(), strict=True):
            for box in part.boxes(plan, level):
                found = file.read(part.entry(box))
                if found.shape != box.shape or found.dtype != part.info.dtype:
                    raise CheckpointError(
                        f"{file.path} holds {shown(part.entry(box))} of shape "
                        f"{tuple(found.shape)}, the plan expects {box.shape}. The files are of "
                        "different models: copy the folder again, or pack the model again."
                    )
                if box.shape == tuple(out.shape):
                    out = found
                else:
                    _put(out, found, box.place, outer)
        return out


def outline_of(layout: Layout, records: Iterable[Record]) -> dict[str, Tensor]:
    """Return every tensor of a layout on the meta device: shapes, dtypes and ties."""
    known = {record.name: record for record in records}

    def owner(name: str) -> str:
        return layout.aliases.get(name, name)

    def made(name: str) -> Tensor:
        record = known[name]
        info = layout.parts[record.parts[-1] if record.sparse else owner(name)].info
        return hollow(record, TensorInfo(record.shape or info.shape, info.dtype))

    return shared(known, owner, made)


def _put(out: Tensor, value: Tensor, place: Place, outer: Place) -> None:
    """Write a value where its indices lie among those that are kept."""
    places = [dims.within(segments, kept) for segments, kept in zip(place, outer, strict=True)]
    if out.dtype in BYTES:
        out, value = out.view(torch.uint8), value.view(torch.uint8)
    if all(len(segments) == 1 for segments in places):
        for dim, ((start, stop),) in enumerate(places):
            out = out.narrow(dim, start, stop - start)
        out.copy_(value)
        return
    rank = len(places)
    index = tuple(
        torch.cat([torch.arange(a, b) for a, b in segments]).view([-1] + [1] * (rank - 1 - dim))
        for dim, segments in enumerate(places)
    )
    out[index] = value
