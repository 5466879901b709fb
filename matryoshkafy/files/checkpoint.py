"""save() and load(): a model as a folder of safetensors and JSON, whole or at one of its sizes.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import assemble, cuts_of, parts_of, reparametrised, state_of
from matryoshkafy.files.dense import Dense, dense_files
from matryoshkafy.files.description import (
    Description,
    check_fields,
    description_from_json,
    description_to_json,
    fitting,
    kind_of,
    tensors_of,
)
from matryoshkafy.files.fitting import check_fit
from matryoshkafy.files.folders import MANIFEST, Writer, digest_file, write_folder
from matryoshkafy.files.graph_json import callables, graph_to_json
from matryoshkafy.files.held import Held, open_folder
from matryoshkafy.files.json_text import parse_json
from matryoshkafy.files.records import (
    CheckpointError,
    files_of,
    nan_names,
    record_from_json,
    record_of,
    shared,
)
from matryoshkafy.plan.plan import Plan
from matryoshkafy.plan.stored import decided

FORMAT = 1
GRAPH = "graph.json"
MAX_GRAPH = 32 * 2**20


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

    force: replace a folder that is not empty; side: further files that the checkpoint keeps and
    checks by their digests. Warns of weights that are NaN. Raises FolderError where the folder is
    taken or cannot be written, JsonError or CheckpointError for a model with parts that cannot be
    saved (both name the part).
    """
    trace, plan = parts_of(model)
    state = tensors_of(model, trace, plan)
    own = set(state_of(model))
    kinds = {name: kind_of(name, tensor, trace, own) for name, tensor in state.items()}
    records = [record_of(name, tensor, kinds[name]) for name, tensor in state.items()]
    _warn_of_nan({r.name: state[r.name] for r in records if r.kind != "statistic"})
    described = {"format": FORMAT, **description_to_json(model, trace, plan, records)}
    graph = graph_to_json(trace.graph, callables(described["namespaces"]))
    writers: dict[str, Writer] = dense_files(state, records)
    writers[GRAPH] = lambda path: path.write_text(json.dumps(graph, allow_nan=False))
    for name, content in (side or {}).items():
        writers[name] = partial(_write_bytes, content)
    writers[MANIFEST] = partial(_write_manifest, described, tuple(writers))
    # What load would refuse is refused now, while the user still has the model.
    return write_folder(folder, writers, force=force, check=_check_written)


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _check_written(path: Path) -> None:
    with open_checkpoint(path, digests=False):
        pass


def load(folder: str | os.PathLike[str], size: float | None = None) -> Doll | fx.GraphModule:
    """Return what was saved; with a size, its sub-model of that size, streamed tensor by tensor.

    size: one of the checkpoint's sizes, or a ratio such as 0.5; `load(folder, size=m)` equals
    `slice(load(folder), m)` bit for bit and never holds more than the sub-model. Raises
    FolderError (no checkpoint, a newer format, a damaged file), PlanError (no such size: it lists
    them), and the errors of the parts.
    """
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.whole() if size is None else checkpoint.sub_model(size)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were checked; models are made of it when asked for.

    The files stay open, so that a folder which is replaced meanwhile goes on being read as it was
    checked; a with statement closes them.
    """

    held: Held
    described: Description

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
        """The sizes that `sub_model` makes, ascending."""
        return list(self.plan.sizes)

    def whole(self) -> Doll | fx.GraphModule:
        """Return the doll, or the sub-model as it was saved."""
        if self.kind == "submodel":
            return self._cut(self.plan.levels - 1, zeros=False)
        with self._reading() as store:
            names = [r.name for r in self.described.records if r.kind != "statistic"]
            return self.described.model(shared(names, store.owner, store.whole))

    def sub_model(self, size: float) -> fx.GraphModule:
        """Return the sub-model of a size; raises PlanError that lists the sizes."""
        return self._cut(self.plan.level(size), zeros=True)

    def _cut(self, level: int, *, zeros: bool) -> fx.GraphModule:
        with self._reading() as store:
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
    def _reading(self) -> Iterator[Dense]:
        with fitting(self.folder), Dense(self.held, self.described.records) as store:
            yield store
            self.held.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        self.held.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def open_checkpoint(folder: str | os.PathLike[str], *, digests: bool = True) -> Checkpoint:
    """Return a checkpoint after checking all of its files; no weights are held.

    digests: whether to compare the SHA-256 of every file, which reads all of it once.
    """
    held, manifest = open_folder(folder, FORMAT)
    try:
        with fitting(held.path):
            return _checked(held, manifest, digests=digests)
    except BaseException:
        held.close()
        raise


def _checked(held: Held, manifest: Mapping[str, Any], *, digests: bool) -> Checkpoint:
    check_fields(manifest, held.path)
    _check_digested(manifest, held.path)
    if digests:
        held.check(manifest["digests"])
    saved = parse_json(held.read(GRAPH, MAX_GRAPH), str(held.path / GRAPH))
    described = description_from_json(manifest, saved, held.path)
    with Dense(held, described.records) as store:
        outline = store.outline()
    check_fit(described.plan, described.trace.graph, outline, held.path)
    if not described.plan.stored:
        # A plan of format 1 leaves masks and what is stored to the reader.
        plan = decided(described.over(outline), described.plan)
        described = replace(described, plan=plan)
    return Checkpoint(held, described)


def _check_digested(manifest: Mapping[str, Any], folder: Path) -> None:
    records = map(record_from_json, manifest["tensors"])
    digests = manifest.get("digests")
    known = digests.keys() if isinstance(digests, dict) else set()
    unlisted = {GRAPH, *files_of(records)} - known
    if unlisted:
        raise CheckpointError(
            f"{folder / MANIFEST} has no digest of {', '.join(sorted(unlisted))}; it is damaged."
        )


def _warn_of_nan(tensors: Mapping[str, Tensor]) -> None:
    names = nan_names(tensors)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"weights that are NaN are saved: {', '.join(names[:5])}{more}. Expected finite "
            "weights; every size that reads them is broken. Check the training run.",
            CheckpointWarning,
            stacklevel=3,
        )


def _write_manifest(described: Mapping[str, Any], files: tuple[str, ...], path: Path) -> None:
    digests = {name: digest_file(path.parent / name) for name in files}
    path.write_text(json.dumps({**described, "digests": digests}, allow_nan=False, indent=1))
