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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from matryoshkafy.axes import dims
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import (
    Cut,
    assemble,
    cuts_of,
    full_statistics,
    masked,
    parts_of,
    reparametrised,
    state_of,
)
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import (
    MANIFEST,
    Writer,
    check_digests,
    digest_file,
    read_manifest,
    write_folder,
)
from matryoshkafy.files.graph_json import callables, graph_from_json, graph_to_json
from matryoshkafy.files.json_text import parse_json, shown
from matryoshkafy.files.operators import allowed, namespaces_of
from matryoshkafy.files.records import (
    CONSTANTS,
    WEIGHTS,
    CheckpointError,
    Record,
    as_parameter,
    contents_of,
    nan_names,
    outline,
    read_whole,
    record_from_json,
    record_of,
    record_to_json,
    shared,
)
from matryoshkafy.files.signature_json import signature_from_json, signature_to_json
from matryoshkafy.files.tensors import TensorFile, write_tensors
from matryoshkafy.graph.nodes import outputs_of
from matryoshkafy.graph.signature import Signature
from matryoshkafy.graph.trace import Trace, attach
from matryoshkafy.plan.plan import Plan, plan_to_dict

FORMAT = 1
GRAPH = "graph.json"
MAX_GRAPH = 64 * 2**20
MISFITS = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError)


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
    write = partial(_write_tensors, state, records)
    writers: dict[str, Writer] = dict.fromkeys(_files(records), write)
    writers[GRAPH] = lambda path: path.write_text(json.dumps(graph, allow_nan=False))
    writers[MANIFEST] = partial(_write_manifest, described, tuple(writers))
    return write_folder(folder, writers, force=force)


def load(folder: str | os.PathLike[str], size: int | None = None) -> Doll | fx.GraphModule:
    """Return what was saved; with a size, its sub-model of that size, streamed tensor by tensor.

    size: one of the checkpoint's sizes; `load(folder, size=m)` equals `slice(load(folder), m)` bit
    for bit and never holds more than the sub-model. Raises FolderError (no checkpoint, a newer
    format, a damaged file), PlanError (no such size: it lists them), and the errors of the parts.
    """
    checkpoint = open_checkpoint(folder)
    return checkpoint.whole() if size is None else checkpoint.sub_model(size)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were checked; models are made of it when asked for.

    kind: "doll" or "submodel". specialised: the trace holds one branch of the user's code only.
    """

    folder: Path
    kind: str
    plan: Plan
    trace: Trace
    records: tuple[Record, ...]
    training: bool
    specialised: bool
    versions: Mapping[str, str]

    @property
    def sizes(self) -> list[int]:
        """The sizes that `sub_model` makes, ascending."""
        return list(self.plan.sizes)

    def whole(self) -> Doll | fx.GraphModule:
        """Return the doll, or the sub-model as it was saved."""
        if self.kind == "submodel":
            return self._cut(self.plan.levels - 1, zeros=False)
        with self._open() as files, _fitting(self.folder):
            read = shared(
                [r.name for r in self.records if r.kind != "statistic"],
                partial(_owner, files, self._by_name),
                lambda name: self._tensor(name, files),
            )
            root = nn.Module()
            for name, tensor in read.items():
                persistent = self._by_name[name].kind != "hidden"
                attach(root, name, tensor, persistent=persistent)
            root.training = self.training
            return Doll(replace(self.trace, root=root), self.plan)

    def sub_model(self, size: int) -> fx.GraphModule:
        """Return the sub-model of a size; raises PlanError that lists the sizes."""
        return self._cut(self.plan.level(size), zeros=True)

    def _cut(self, level: int, *, zeros: bool) -> fx.GraphModule:
        with self._open() as files, _fitting(self.folder):
            root = nn.Module()
            for name, tensor in outline(self.records, files).items():
                attach(root, name, tensor)
            root.training = self.training
            trace = replace(self.trace, root=root)
            cuts = {cut.name: cut for cut in cuts_of(trace, self.plan, level)}
            owner = partial(_owner, files, self._by_name)
            tensors = shared(
                cuts,
                lambda name: (owner(name), cuts[name].segments),
                lambda name: self._taken(cuts[name], files, zeros=zeros),
            )
            if zeros and level < self.plan.levels - 1:
                full = OnDemand(names=tuple(tensors), read=lambda name: self._tensor(name, files))
                tensors |= reparametrised(trace, self.plan, full, level)
            kinds = {record.name: record.as_kind for record in self.records}
            return assemble(trace, self.plan.up_to(level), tensors, kinds)

    def _tensor(self, name: str, files: Mapping[str, TensorFile]) -> Tensor:
        record = self._by_name[name]
        return as_parameter(read_whole(record, files[record.file]), record)

    def _taken(self, cut: Cut, files: Mapping[str, TensorFile], *, zeros: bool) -> Tensor:
        record = self._by_name[cut.name]
        if record.sparse:
            return read_whole(record, files[record.file])
        tensor = files[record.file].read_slice(cut.name, cut.segments)
        return masked(tensor, cut.mask) if zeros else tensor

    @cached_property
    def _by_name(self) -> dict[str, Record]:
        return {record.name: record for record in self.records}

    @contextmanager
    def _open(self) -> Iterator[dict[str, TensorFile]]:
        with ExitStack() as stack:
            names = _files(self.records)
            yield {n: stack.enter_context(TensorFile(self.folder / n)) for n in names}


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
    manifest = read_manifest(folder, FORMAT)
    path = Path(folder)
    _check_listed(manifest, path)
    if digests:
        check_digests(path, manifest["digests"])
    records = tuple(map(record_from_json, manifest["tensors"]))
    with _fitting(path):
        plan = Plan.from_json(json.dumps(manifest["plan"]))
        trace = _trace_of(manifest, path, records)
    found = Checkpoint(
        folder=path,
        kind=manifest["kind"],
        plan=plan,
        trace=trace,
        records=records,
        training=manifest.get("training") is True,
        specialised=manifest.get("specialised") is True,
        versions={k: str(v)[:80] for k, v in manifest["versions"].items()},
    )
    with found._open() as files:
        _check_shapes(found, outline(records, files))
    return found


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


def _files(records: Any) -> list[str]:
    used = {record.file for record in records}
    return [WEIGHTS, *([CONSTANTS] if CONSTANTS in used else [])]


def _write_tensors(state: Mapping[str, Tensor], records: list[Record], path: Path) -> None:
    contents = contents_of(records, state, path.name)
    write_tensors(path, contents.entries, aliases=contents.aliases)


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
    unlisted = {GRAPH, *_files(records)} - manifest["digests"].keys()
    if unlisted:
        raise CheckpointError(
            f"{folder / MANIFEST} has no digest of {', '.join(sorted(unlisted))}; it is damaged."
        )


def _trace_of(manifest: Mapping[str, Any], folder: Path, records: tuple[Record, ...]) -> Trace:
    with open(folder / GRAPH, "rb") as file:
        saved = parse_json(file.read(MAX_GRAPH + 1), str(folder / GRAPH))
    graph = graph_from_json(saved, callables(allowed(manifest["namespaces"], str(folder))))
    signature = signature_from_json(manifest["signature"])
    _check_call(graph, signature, folder)
    _check_reads(graph, {record.name for record in records}, folder, manifest["kind"])
    hidden = frozenset(record.name for record in records if record.kind == "hidden")
    notes = tuple(str(note) for note in manifest["notes"])
    return Trace(graph, signature, nn.Module(), notes, hidden)


def _check_reads(graph: fx.Graph, names: set[str], folder: Path, kind: str) -> None:
    """The graph reads saved tensors and nothing else; a sub-model may need fewer of them."""
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for target in targets - names - {"training"}:
        reserved = any(hasattr(nn.Module, part) for part in target.split("."))
        if kind == "doll" or reserved:
            raise CheckpointError(
                f"{folder}: the graph reads {shown(target)}, which was not saved. The files are of "
                "different models, or damaged: save the model again."
            )


def _check_call(graph: fx.Graph, signature: Signature, folder: Path) -> None:
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    outputs = outputs_of(graph)
    expected = sum(sum(item.is_tensor) for item in signature.inputs)
    if inputs != expected or not isinstance(outputs, (list, tuple)):
        raise CheckpointError(f"{folder}: the graph has {inputs} inputs, its call {expected}.")
    if len(outputs) != signature.out_spec.num_leaves:
        raise CheckpointError(f"{folder}: the graph's outputs do not fit its call's: damaged.")


def _check_shapes(found: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a plan about other shapes: it would slice out of bounds."""
    _check_groups(found.plan, found.folder)
    full = found.plan.ladder[-1]
    for name, axes in found.plan.parameters.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        planned = tuple(dims.size_at(dim, full) for dim in axes)
        if shape is not None and shape != planned:
            raise CheckpointError(
                f"{found.folder}: the plan expects {name} of shape {planned}, the file holds "
                f"{shape}. The plan belongs to another model: save the model again."
            )


def _check_groups(plan: Plan, folder: Path) -> None:
    sizes = {i: group.size for i, group in enumerate(plan.groups)}
    for factor in _factors(plan):
        if sizes.get(factor.group) != factor.size:
            raise CheckpointError(
                f"{folder}: the plan has an axis of {factor.size} units in group {factor.group}, "
                f"which has {sizes.get(factor.group)}. The plan is damaged: save the model again."
            )


def _factors(plan: Plan) -> Iterator[dims.Nested]:
    stack: list[Any] = [plan.parameters.values(), plan.nodes.values()]
    stack += [notes.values() for notes in plan.notes.values()]
    while stack:
        item = stack.pop()
        if isinstance(item, dims.Nested):
            yield item
        elif isinstance(item, dims.Cat):
            stack.append(item.parts)
        elif not isinstance(item, int):
            stack.extend(item)


def _owner(files: Mapping[str, TensorFile], records: Mapping[str, Record], name: str) -> Any:
    file = records[name].file
    return file, files[file].aliases.get(name, name)


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
