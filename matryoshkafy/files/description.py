"""What a model is beside its tensors, as JSON, and back: plan, graph, call, kinds, versions."""

from __future__ import annotations

import json
from collections.abc import Container, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from matryoshkafy.dolls.cuts import full_statistics
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import assemble, state_of
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.fitting import check_call, check_reads
from matryoshkafy.files.folders import MANIFEST
from matryoshkafy.files.graph_json import callables, graph_from_json
from matryoshkafy.files.json_text import Json, escaped, is_list, printable, shown
from matryoshkafy.files.operators import allowed, namespaces_of
from matryoshkafy.files.records import (
    CheckpointError,
    Record,
    record_from_json,
    record_of,
    record_to_json,
)
from matryoshkafy.files.signature_json import signature_from_json, signature_to_json
from matryoshkafy.graph.capture import SPECIALISED
from matryoshkafy.graph.trace import Trace, attach
from matryoshkafy.plan.plan import Plan, plan_to_dict

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
FIELDS: Mapping[str, type] = {
    "kind": str,
    "versions": dict,
    "notes": list,
    "namespaces": list,
    "tensors": list,
    "signature": dict,
    "plan": dict,
}


@dataclass(frozen=True)
class Description:
    """What was read of a model; its trace holds no tensors yet.

    kind: "doll" or "submodel". specialised: the trace holds one branch of the user's code only.
    """

    kind: str
    plan: Plan
    trace: Trace
    records: tuple[Record, ...]
    training: bool
    specialised: bool
    versions: Mapping[str, str]

    def over(self, tensors: Mapping[str, Tensor]) -> Trace:
        """Return the trace with these tensors under the user's names."""
        hidden = {record.name for record in self.records if record.kind == "hidden"}
        root = nn.Module()
        for name, tensor in tensors.items():
            attach(root, name, tensor, persistent=name not in hidden)
        root.training = self.training
        return replace(self.trace, root=root)

    def model(self, tensors: Mapping[str, Tensor]) -> Doll | fx.GraphModule:
        """Return the doll or the sub-model of these tensors, as large as they are."""
        if self.kind == "doll":
            return Doll(self.over(tensors), self.plan)
        kinds = {record.name: record.as_kind for record in self.records}
        return assemble(self.over(tensors), self.plan, tensors, kinds)


def description_to_json(
    model: nn.Module, trace: Trace, plan: Plan, records: Sequence[Record]
) -> dict[str, Any]:
    """Return what a model is beside its tensors and its graph."""
    return {
        "kind": "doll" if isinstance(model, Doll) else "submodel",
        "versions": {"matryoshkafy": _own_version(), "torch": torch.__version__},
        "sizes": list(plan.sizes),
        "nesting": plan.options.nesting,
        "specialised": any(note.startswith(SPECIALISED) for note in trace.notes),
        "notes": list(trace.notes),
        "training": model.training,
        "namespaces": list(namespaces_of(trace.graph)),
        "tensors": [record_to_json(record) for record in records],
        "signature": signature_to_json(trace.signature),
        "plan": plan_to_dict(plan),
    }


def check_fields(saved: Json, place: Path) -> None:
    """Raise CheckpointError unless the fields of a description are there and of their types."""
    for key, kind in FIELDS.items():
        if not isinstance(saved.get(key), kind):
            raise CheckpointError(
                f"{place / MANIFEST} has {shown(saved.get(key))} for {key!r}, expected a "
                f"{kind.__name__}. The file is damaged: copy it again, or save the model again."
            )
    if saved["kind"] not in ("doll", "submodel"):
        raise CheckpointError(f"{place} holds a {shown(saved['kind'])}: no doll, no submodel.")


def description_from_json(saved: Json, graph: object, place: Path) -> Description:
    """Return what description_to_json and graph_to_json wrote; place: how an error calls it."""
    records = tuple(map(record_from_json, saved["tensors"]))
    return Description(
        kind=saved["kind"],
        plan=Plan.from_json(json.dumps(_legible(saved["plan"]))),
        trace=_trace_of(saved, graph, records, place),
        records=records,
        training=saved.get("training") is True,
        specialised=saved.get("specialised") is True,
        versions={escaped(k): escaped(str(v)[:80]) for k, v in saved["versions"].items()},
    )


def _legible(plan: Json) -> Json:
    """Return a plan of a file whose names can be shown; remarks may have several lines."""
    found = plan.get("remarks")
    remarks = {"remarks": [printable(str(r)) for r in found]} if is_list(found) else {}
    return {**escaped(plan), **remarks}


def saved_tensors(model: nn.Module, trace: Trace, plan: Plan) -> dict[str, Tensor]:
    """Every tensor to save, in the model's order; hidden buffers only if the graph reads them."""
    read = {str(node.target) for node in trace.graph.nodes if node.op == "get_attr"}
    kept = {n: t for n, t in state_of(model).items() if trace.is_persistent(n) or n in read}
    holder = replace(trace, root=model)
    return kept | {n: t for n, t in full_statistics(holder, plan).items() if n not in kept}


def standing_of(name: str, tensor: Tensor, trace: Trace, own: Container[str]) -> str:
    """Return how a tensor stands in the model; own: the names of those that the model holds."""
    if isinstance(tensor, nn.Parameter):
        return "parameter"
    if name not in own:
        return "statistic"
    return "buffer" if trace.is_persistent(name) else "hidden"


def records_of(tensors: Mapping[str, Tensor], trace: Trace, own: Container[str]) -> list[Record]:
    """Return how each tensor is saved; own: the names of those that the model holds."""
    return [record_of(n, t, standing_of(n, t, trace, own)) for n, t in tensors.items()]


@contextmanager
def fitting(place: Path) -> Generator[None, None, None]:
    """Parts of a checkpoint that contradict each other are one error, which names the place."""
    try:
        yield
    except MISFITS as error:
        if isinstance(error, MatryoshkafyError):
            raise
        raise CheckpointError(
            f"{place}: graph, plan and weights do not fit together "
            f"({type(error).__name__}: {str(error)[:160]}). Copy the folder again, or save the "
            "model again."
        ) from error


def _trace_of(saved: Json, graph_json: object, records: tuple[Record, ...], place: Path) -> Trace:
    graph = graph_from_json(graph_json, callables(allowed(saved["namespaces"], str(place))))
    signature = signature_from_json(saved["signature"])
    check_call(graph, signature, place)
    check_reads(graph, {record.name for record in records}, place, saved["kind"])
    hidden = frozenset(record.name for record in records if record.kind == "hidden")
    notes = tuple(printable(str(note)) for note in saved["notes"])
    return Trace(graph, signature, nn.Module(), notes, hidden)


def _own_version() -> str:
    try:
        return version("matryoshkafy")
    except PackageNotFoundError:
        return "unknown"
