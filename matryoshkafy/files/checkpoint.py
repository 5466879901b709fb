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
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import (
    assemble,
    cuts_of,
    full_statistics,
    parts_of,
    reparametrised,
    state_of,
)
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.dense import Dense, dense_files
from matryoshkafy.files.fitting import check_call, check_fit, check_reads
from matryoshkafy.files.folders import MANIFEST, Writer, digest_file, write_folder
from matryoshkafy.files.graph_json import callables, graph_from_json, graph_to_json
from matryoshkafy.files.held import Held, open_folder
from matryoshkafy.files.json_text import parse_json, printable, shown
from matryoshkafy.files.operators import allowed, namespaces_of
from matryoshkafy.files.records import (
    CheckpointError,
    Record,
    files_of,
    nan_names,
    record_from_json,
    record_of,
    record_to_json,
    shared,
)
from matryoshkafy.files.signature_json import signature_from_json, signature_to_json
from matryoshkafy.graph.trace import Trace, attach
from matryoshkafy.plan.plan import Plan, plan_to_dict
from matryoshkafy.plan.stored import decided

FORMAT = 1
GRAPH = "graph.json"
MAX_GRAPH = 32 * 2**20
MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class CheckpointWarning(UserWarning):
    """A model was saved that is probably not what the user wants."""


def save(model: nn.Module, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a doll or a sub-model as a checkpoint folder, whole or not at all; return its path.

    force: replace a folder that is not empty. Warns of weights that are NaN. Raises FolderError
    where the folder is taken or cannot be written, JsonError or CheckpointError for a model with
    parts that cannot be saved (both name the part).
    """
    trace, plan = parts_of(model)
    state = _state(model, trace, plan)
    own = set(state_of(model))
    kinds = {name: _kind(name, tensor, trace, own) for name, tensor in state.items()}
    records = [record_of(name, tensor, kinds[name]) for name, tensor in state.items()]
    _warn_of_nan({r.name: state[r.name] for r in records if r.kind != "statistic"})
    described = _described(model, trace, plan, records)
    graph = graph_to_json(trace.graph, callables(described["namespaces"]))
    writers: dict[str, Writer] = dense_files(state, records)
    writers[GRAPH] = lambda path: path.write_text(json.dumps(graph, allow_nan=False))
    writers[MANIFEST] = partial(_write_manifest, described, tuple(writers))
    # What load would refuse is refused now, while the user still has the model.
    return write_folder(folder, writers, force=force, check=_check_written)


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
    checked; a with statement closes them. kind: "doll" or "submodel". specialised: the trace holds
    one branch of the user's code only.
    """

    held: Held
    kind: str
    plan: Plan
    trace: Trace
    records: tuple[Record, ...]
    training: bool
    specialised: bool
    versions: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where the files were found."""
        return self.held.path

    @property
    def sizes(self) -> list[int]:
        """The sizes that `sub_model` makes, ascending."""
        return list(self.plan.sizes)

    def whole(self) -> Doll | fx.GraphModule:
        """Return the doll, or the sub-model as it was saved."""
        if self.kind == "submodel":
            return self._cut(self.plan.levels - 1, zeros=False)
        with self._reading() as store:
            names = [r.name for r in self.records if r.kind != "statistic"]
            hidden = {r.name for r in self.records if r.kind == "hidden"}
            root = nn.Module()
            for name, tensor in shared(names, store.owner, store.whole).items():
                attach(root, name, tensor, persistent=name not in hidden)
            root.training = self.training
            return Doll(replace(self.trace, root=root), self.plan)

    def sub_model(self, size: float) -> fx.GraphModule:
        """Return the sub-model of a size; raises PlanError that lists the sizes."""
        return self._cut(self.plan.level(size), zeros=True)

    def _cut(self, level: int, *, zeros: bool) -> fx.GraphModule:
        with self._reading() as store:
            root = nn.Module()
            for name, tensor in store.outline().items():
                attach(root, name, tensor)
            root.training = self.training
            trace = replace(self.trace, root=root)
            cuts = {cut.name: cut for cut in cuts_of(self.plan, level)}
            tensors = shared(
                cuts,
                lambda name: (store.owner(name), cuts[name].segments),
                lambda name: store.cut(cuts[name], zeros=zeros),
            )
            if zeros and level < self.plan.levels - 1:
                full = OnDemand(tuple(tensors), store.whole)
                tensors |= reparametrised(trace, self.plan, full, level)
            kinds = {record.name: record.as_kind for record in self.records}
            return assemble(trace, self.plan.up_to(level), tensors, kinds)

    @contextmanager
    def _reading(self) -> Iterator[Dense]:
        with _fitting(self.folder), Dense(self.held, self.records) as store:
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
        with _fitting(held.path):
            return _checked(held, manifest, digests=digests)
    except BaseException:
        held.close()
        raise


def _checked(held: Held, manifest: Mapping[str, Any], *, digests: bool) -> Checkpoint:
    _check_listed(manifest, held.path)
    if digests:
        held.check(manifest["digests"])
    records = tuple(map(record_from_json, manifest["tensors"]))
    plan = Plan.from_json(json.dumps(manifest["plan"]))
    found = Checkpoint(
        held=held,
        kind=manifest["kind"],
        plan=plan,
        trace=_trace_of(manifest, held, records),
        records=records,
        training=manifest.get("training") is True,
        specialised=manifest.get("specialised") is True,
        versions={k: str(v)[:80] for k, v in manifest["versions"].items()},
    )
    with Dense(held, records) as store:
        outline = store.outline()
        check_fit(plan, found.trace.graph, outline, held.path)
        return found if plan.stored else replace(found, plan=_decided(found, outline))


def _decided(found: Checkpoint, outline: Mapping[str, Tensor]) -> Plan:
    """A plan of format 1 leaves masks and what is stored to the reader."""
    root = nn.Module()
    for name, tensor in outline.items():
        attach(root, name, tensor)
    return decided(replace(found.trace, root=root), found.plan)


def _state(model: nn.Module, trace: Trace, plan: Plan) -> dict[str, Tensor]:
    """Every tensor to save, in the model's order; hidden buffers only if the graph reads them."""
    read = {str(node.target) for node in trace.graph.nodes if node.op == "get_attr"}
    kept = {n: t for n, t in state_of(model).items() if trace.is_persistent(n) or n in read}
    holder = replace(trace, root=model)
    return kept | {n: t for n, t in full_statistics(holder, plan).items() if n not in kept}


def _kind(name: str, tensor: Tensor, trace: Trace, own: Container[str]) -> str:
    if isinstance(tensor, nn.Parameter):
        return "parameter"
    if name not in own:
        return "statistic"
    return "buffer" if trace.is_persistent(name) else "hidden"


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


def _described(model: nn.Module, trace: Trace, plan: Plan, records: list[Record]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "doll" if isinstance(model, Doll) else "submodel",
        "versions": {"matryoshkafy": _own_version(), "torch": torch.__version__},
        "sizes": list(plan.sizes),
        "nesting": plan.options.nesting,
        "specialised": any(note.startswith("specialised") for note in trace.notes),
        "notes": list(trace.notes),
        "training": model.training,
        "namespaces": list(namespaces_of(trace.graph)),
        "tensors": [record_to_json(record) for record in records],
        "signature": signature_to_json(trace.signature),
        "plan": plan_to_dict(plan),
    }


def _own_version() -> str:
    try:
        return version("matryoshkafy")
    except PackageNotFoundError:
        return "unknown"


def _write_manifest(described: Mapping[str, Any], files: tuple[str, ...], path: Path) -> None:
    digests = {name: digest_file(path.parent / name) for name in files}
    path.write_text(json.dumps({**described, "digests": digests}, allow_nan=False, indent=1))


FIELDS: Mapping[str, type] = {
    "kind": str,
    "versions": dict,
    "notes": list,
    "namespaces": list,
    "tensors": list,
    "signature": dict,
    "plan": dict,
    "digests": dict,
}


def _check_listed(manifest: Mapping[str, Any], folder: Path) -> None:
    for key, kind in FIELDS.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(
                f"{folder / MANIFEST} has {shown(manifest.get(key))} for {key!r}, expected a "
                f"{kind.__name__}. The file is damaged: copy it again, or save the model again."
            )
    if manifest["kind"] not in ("doll", "submodel"):
        raise CheckpointError(f"{folder} holds a {shown(manifest['kind'])}: no doll, no submodel.")
    records = map(record_from_json, manifest["tensors"])
    unlisted = {GRAPH, *files_of(records)} - manifest["digests"].keys()
    if unlisted:
        raise CheckpointError(
            f"{folder / MANIFEST} has no digest of {', '.join(sorted(unlisted))}; it is damaged."
        )


def _trace_of(manifest: Mapping[str, Any], held: Held, records: tuple[Record, ...]) -> Trace:
    folder = held.path
    saved = parse_json(held.read(GRAPH, MAX_GRAPH), str(folder / GRAPH))
    graph = graph_from_json(saved, callables(allowed(manifest["namespaces"], str(folder))))
    signature = signature_from_json(manifest["signature"])
    check_call(graph, signature, folder)
    check_reads(graph, {record.name for record in records}, folder, manifest["kind"])
    hidden = frozenset(record.name for record in records if record.kind == "hidden")
    notes = tuple(printable(str(note)) for note in manifest["notes"])
    return Trace(graph, signature, nn.Module(), notes, hidden)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Parts of a checkpoint that contradict each other are one error, which names the folder."""
    try:
        yield
    except MISFITS as error:
        if isinstance(error, MatryoshkafyError):
            raise
        raise CheckpointError(
            f"{folder}: graph, plan and weights do not fit together "
            f"({type(error).__name__}: {str(error)[:160]}). Copy the folder again, or save the "
            "model again."
        ) from error
