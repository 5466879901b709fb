"""save() and load(): a model as a folder of safetensors and JSON, whole or at one of its sizes.

pack() writes the progressive layout instead of the first two files: a file per level (levels.py).

    model.safetensors      the tensors that state_dict shows, under the user's names
    constants.safetensors  the others that the graph reads (only where there are any)
    graph.json             the traced graph
    matryoshka.json        plan, call signature, kinds of the tensors, versions, digest of each file

No pickle is written or read, and nothing is imported or evaluated by a name out of a file.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from pathlib import Path

from torch import Tensor, fx, nn

from matryoshkafy.dolls.cuts import cuts_of, reparametrised
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import assemble, parts_of, state_of
from matryoshkafy.files.dense import Dense, dense_files
from matryoshkafy.files.description import (
    Description,
    check_fields,
    description_from_json,
    description_to_json,
    fitting,
    records_of,
    saved_tensors,
)
from matryoshkafy.files.fitting import check_fit
from matryoshkafy.files.folders import MANIFEST, Writer, digest_file, write_folder
from matryoshkafy.files.graph_json import callables, graph_to_json
from matryoshkafy.files.held import LEVEL_FILE, Closing, Held, open_folder
from matryoshkafy.files.json_text import Json, check_signed, is_object, parse_json, signed
from matryoshkafy.files.levels import Layout, Levels, layout_from_json, outline_of
from matryoshkafy.files.records import (
    CheckpointError,
    Record,
    files_of,
    nan_names,
    shared,
)
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.stored import decided

# The layout by levels came with format 2; all else is as in format 1.
FORMAT, DENSE_FORMAT = 2, 1
PACKED = "levels"
GRAPH = "graph.json"
MAX_GRAPH = 32 * 2**20
MAX_SIDE = 2**28

Parts = tuple[nn.Module, Trace, Plan, list[Record]]


class CheckpointWarning(UserWarning):
    """A model was saved that is probably not what the user wants."""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    side: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a doll or a sub-model as a checkpoint folder, whole or not at all; return its path.

    Warns of weights that are NaN.

    Args:
        model: a doll or a sub-model.
        folder: where to write.
        force: replace a folder that is not empty.
        side: further files that the checkpoint keeps and checks by their digests.

    Raises:
        FolderError: where the folder is taken or cannot be written.
        CheckpointError: a model with parts that cannot be saved, named; so does JsonError.
    """
    parts, state = parts_to_save(model)
    writers = {**dense_files(state, parts[-1]), **side_writers(side or {})}
    return write_checkpoint(folder, parts, writers, force=force)


def parts_to_save(model: nn.Module) -> tuple[Parts, dict[str, Tensor]]:
    """Return the parts of a model for `write_checkpoint`, and its tensors; warns of NaN."""
    trace, plan = parts_of(model)
    state = saved_tensors(model, trace, plan)
    records = records_of(state, trace, state_of(model))
    _warn_of_nan({r.name: state[r.name] for r in records if r.kind != "statistic"})
    return (model, trace, plan, records), state


def write_checkpoint(
    folder: str | os.PathLike[str],
    parts: Parts,
    writers: Mapping[str, Writer],
    layout: Mapping[str, object] | None = None,
    *,
    force: bool = False,
) -> Path:
    """Write a checkpoint folder whole or not at all, and read it back before it stands.

    Args:
        folder: where.
        parts: the model, its trace, its plan, and how its tensors stand in it.
        writers: how the tensor files are written.
        layout: what the layout by levels says; None for whole tensors.
        force: replace an earlier checkpoint.
    """
    described = description_to_json(*parts)
    version = {"format": DENSE_FORMAT} if layout is None else {"format": FORMAT, PACKED: layout}
    graph = graph_to_json(parts[1].graph, callables(described["namespaces"]))
    every: dict[str, Writer] = dict(writers)
    every[GRAPH] = lambda path: path.write_text(json.dumps(graph, allow_nan=False))
    every[MANIFEST] = partial(_write_manifest, {**version, **described}, tuple(every))
    # What load would refuse is refused now, while the user still has the model.
    return write_folder(folder, every, force=force, check=_check_written)


def side_writers(side: Mapping[str, bytes]) -> dict[str, Writer]:
    """Return how further files are written, by name."""
    return {name: methodcaller("write_bytes", content) for name, content in side.items()}


def _check_written(path: Path) -> None:
    with open_checkpoint(path, digests=False):
        pass


def load(folder: str | os.PathLike[str], size: float | None = None) -> Doll | fx.GraphModule:
    """Return what was saved; with a size, its sub-model of that size, streamed tensor by tensor.

    `load(folder, size=m)` equals `slice(load(folder), m)` bit for bit and never holds more than the
    sub-model.

    Args:
        folder: a checkpoint.
        size: one of its sizes, or a ratio such as 0.5; None for all that was saved.

    Raises:
        FolderError: no checkpoint, a newer format, a damaged file.
        PlanError: no such size; it lists them. Also the errors of the parts.
    """
    with open_checkpoint(folder, size=size) as checkpoint:
        return checkpoint.whole() if size is None else checkpoint.sub_model(size)


@dataclass(frozen=True)
class Checkpoint(Closing):
    """A checkpoint whose files were checked; models are made of it when asked for.

    The files stay open, so that a folder which is replaced meanwhile goes on being read as it was
    checked; a with statement closes them. Made by `open_checkpoint`.

    Args:
        held: the open folder.
        described: what its manifest says.
        layout: how packed files share out the tensors; None where they are dense.
    """

    held: Held
    described: Description
    layout: Layout | None = None

    @property
    def folder(self) -> Path:
        """Where the files were found."""
        return self.held.path

    @property
    def kind(self) -> str:
        """What was saved: "doll" or "submodel"."""
        return self.described.kind

    @property
    def plan(self) -> Plan:
        """The plan of the model that was saved."""
        return self.described.plan

    @property
    def sizes(self) -> list[int]:
        """The sizes that `sub_model` makes, ascending: of a packed one, those whose files are
        here.
        """
        files = [] if self.layout is None else self.layout.files
        missing = [level for level, name in enumerate(files) if not self.held.has(name)]
        return list(self.plan.sizes[: missing[0]] if missing else self.plan.sizes)

    def side(self) -> dict[str, bytes]:
        """Return the further files that the checkpoint keeps, by name."""
        own = {GRAPH, MANIFEST, *files_of(self.described.records)}
        names = [n for n in self.held.names if n not in own and not LEVEL_FILE.fullmatch(n)]
        return {name: self.held.read(name, MAX_SIDE) for name in names}

    def whole(self) -> Doll | fx.GraphModule:
        """Return the doll, or the sub-model as it was saved."""
        if self.kind == "submodel":
            return self._cut(self.plan.levels - 1, zeros=False)
        with self._reading(self.plan.levels - 1) as store:
            names = [r.name for r in self.described.records if r.kind != "statistic"]
            return self.described.model(shared(names, store.owner, store.whole))

    def sub_model(self, size: float) -> fx.GraphModule:
        """Return the sub-model of a size; raises PlanError that lists the sizes."""
        return self._cut(self.plan.level(size), zeros=True)

    def larger(self, level: int, first: int, base: Mapping[str, Tensor]) -> fx.GraphModule:
        """Return the sub-model of a level out of the tensors of level first - 1."""
        return self._cut(level, first=first, base=base)

    @contextmanager
    def tensors(self, size: float) -> Generator[Mapping[str, Tensor], None, None]:
        """Yield the tensors of a size by name, each read when it is asked for, and not kept.

        Of the largest size also those that no sub-model reads. Raises PlanError that lists the
        sizes.
        """
        level = self.plan.level(size)
        cuts = {cut.name: cut for cut in cuts_of(self.plan, level)}
        every = [r.name for r in self.described.records if r.kind != "statistic"]
        names = every if level == self.plan.levels - 1 else [n for n in every if n in cuts]
        with self._reading(level) as store:

            def read(name: str) -> Tensor:
                return store.cut(cuts[name], zeros=True) if name in cuts else store.whole(name)

            yield OnDemand(tuple(names), read)

    def _cut(
        self,
        level: int,
        *,
        zeros: bool = True,
        first: int = 0,
        base: Mapping[str, Tensor] | None = None,
    ) -> fx.GraphModule:
        with self._reading(level, first, base) as store:
            trace = self.described.over(store.outline())
            cuts = {cut.name: cut for cut in cuts_of(self.plan, level)}
            tensors = shared(
                cuts,
                lambda name: (store.owner(name), cuts[name].segments),
                lambda name: store.cut(cuts[name], zeros=zeros),
            )
            if zeros and level < self.plan.levels - 1:
                full = OnDemand(tuple(tensors), store.whole)
                tensors |= reparametrised(trace, self.plan, full, level)
            kinds = {record.name: record.as_kind for record in self.described.records}
            return assemble(trace, self.plan.up_to(level), tensors, kinds)

    @contextmanager
    def _reading(
        self, level: int, first: int = 0, base: Mapping[str, Tensor] | None = None
    ) -> Generator[Dense | Levels, None, None]:
        records = self.described.records
        with fitting(self.folder):
            if self.layout is None:
                store = Dense(self.held, records)
            else:
                store = Levels(self.held, records, self.layout, range(first, level + 1), base)
            with store:
                yield store
                self.held.check_unchanged()

    def close(self) -> None:
        self.held.close()


@dataclass(frozen=True)
class OnDemand(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, and not kept."""

    names: tuple[str, ...]
    read: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_checkpoint(
    folder: str | os.PathLike[str],
    *,
    size: float | None = None,
    first: int = 0,
    digests: bool = True,
) -> Checkpoint:
    """Return a checkpoint after checking its files; no weights are held.

    Args:
        folder: where.
        size: the only size that is wanted; of a packed checkpoint no later file is looked at.
        first: the first level that is wanted of a packed checkpoint.
        digests: whether to compare the SHA-256 of the files, which reads each of them once.

    Raises:
        FolderError, CheckpointError, JsonError, PlanError: as `load` does.
    """
    held, manifest = open_folder(folder, FORMAT)
    try:
        with fitting(held.path):
            check_signed(manifest, str(held.path / MANIFEST))
            recorded = manifest.get("digests")
            if digests and is_object(recorded):
                held.check(recorded, [n for n in recorded if not LEVEL_FILE.fullmatch(n)])
            found = _checked(held, manifest)
            if digests:
                held.check(recorded, _levels(found, size, first))
            return found
    except BaseException:
        held.close()
        raise


def _levels(found: Checkpoint, size: float | None, first: int) -> list[str]:
    """The files of the levels that are wanted, of a packed checkpoint."""
    if found.layout is None:
        return []
    last = len(found.sizes) - 1 if size is None else found.plan.level(size)
    return found.layout.files[first : last + 1]


def _checked(held: Held, manifest: Json) -> Checkpoint:
    check_fields(manifest, held.path)
    saved = parse_json(held.read(GRAPH, MAX_GRAPH), str(held.path / GRAPH))
    described = description_from_json(manifest, saved, held.path)
    layout = None
    if PACKED in manifest:
        layout = layout_from_json(manifest[PACKED], described.plan, described.records)
    _check_digested(manifest, files_of(described.records) if layout is None else layout.files, held)
    outline = _outline(held, described, layout)
    check_fit(described.plan, described.trace.graph, outline, held.path)
    if not described.plan.stored:
        # A plan of format 1 leaves masks and what is stored to the reader.
        plan = decided(described.over(outline), described.plan)
        described = replace(described, plan=plan)
    return Checkpoint(held, described, layout)


def _outline(held: Held, described: Description, layout: Layout | None) -> dict[str, Tensor]:
    if layout is not None:
        return outline_of(layout, described.records)
    with Dense(held, described.records) as store:
        return store.outline()


def _check_digested(manifest: Json, files: Sequence[str], held: Held) -> None:
    digests = manifest.get("digests")
    known = set(digests) if is_object(digests) else set[str]()
    unlisted = {GRAPH, *files} - known
    if unlisted:
        raise CheckpointError(
            f"{held.path / MANIFEST} has no digest of {', '.join(sorted(unlisted))}; it is damaged."
        )


def _warn_of_nan(tensors: Mapping[str, Tensor]) -> None:
    names = nan_names(tensors)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"weights that are NaN are saved: {', '.join(names[:5])}{more}. Expected finite "
            "weights; every size that reads them is broken. Check the training run.",
            CheckpointWarning,
            stacklevel=5,
        )


def _write_manifest(described: Json, files: tuple[str, ...], path: Path) -> None:
    digests = {name: digest_file(path.parent / name) for name in files}
    whole = {**described, "digests": digests}
    path.write_text(json.dumps(signed(whole), allow_nan=False, indent=1))
