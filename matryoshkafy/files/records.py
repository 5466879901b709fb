"""The tensors of a model as entries of safetensors files, and back: names, ties, kinds.

`model.safetensors` holds what the user's state_dict shows. `constants.safetensors` holds what it
does not: hidden buffers, constants that tracing lifted, full-width statistics, sparse tensors (by
their parts, because the format is dense).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.cuts import Kind
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.graph_json import is_path
from matryoshkafy.files.header import Entry
from matryoshkafy.files.json_text import is_list, is_object, shown
from matryoshkafy.files.tensors import TensorFile, entry_of, write_tensors
from matryoshkafy.graph.nodes import TensorInfo

WEIGHTS, CONSTANTS = "model.safetensors", "constants.safetensors"
SPARSE: Mapping[str, tuple[torch.layout, tuple[str, ...]]] = {
    "coo": (torch.sparse_coo, ("_indices", "_values")),
    "csr": (torch.sparse_csr, ("crow_indices", "col_indices", "values")),
    "csc": (torch.sparse_csc, ("ccol_indices", "row_indices", "values")),
}
NAN_CHUNK = 2**22
_sparse: Any = torch  # its makers of sparse tensors take more than their types say


class CheckpointError(MatryoshkafyError):
    """A checkpoint whose parts do not fit together, or a model that cannot be saved."""


@dataclass(frozen=True)
class Record:
    """How a saved tensor stands in the model, in the model's order.

    kind: parameter, buffer (shown by state_dict), hidden (a buffer that is not) or statistic (of
    parameters, at full width; only sub-models read it). sparse: "" or a row of SPARSE.
    """

    name: str
    kind: str
    requires_grad: bool = False
    sparse: str = ""
    shape: tuple[int, ...] = ()
    coalesced: bool = False

    @property
    def file(self) -> str:
        """The file that holds the tensor."""
        return WEIGHTS if self.kind in ("parameter", "buffer") and not self.sparse else CONSTANTS

    @property
    def as_kind(self) -> Kind:
        """How slicing.assemble wants to hear of it."""
        return Kind(self.kind == "parameter", self.requires_grad)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors in the file."""
        if not self.sparse:
            return (self.name,)
        return tuple(f"{self.name}:{part.strip('_')}" for part in SPARSE[self.sparse][1])


KINDS = ("parameter", "buffer", "hidden", "statistic")


def record_of(name: str, tensor: Tensor, kind: str) -> Record:
    """Return how a tensor is saved; raises CheckpointError for layouts that cannot be."""
    if not is_path(name):
        raise CheckpointError(
            f"the model has a tensor called {shown(name)}, which cannot be saved: expected parts "
            "of letters, digits and _-:/+@, joined by dots. Rename it."
        )
    if tensor.layout is torch.strided:
        return Record(name, kind, tensor.requires_grad)
    rows = [key for key, (layout, _) in SPARSE.items() if layout is tensor.layout]
    if not rows:
        raise CheckpointError(
            f"{name} is a {tensor.layout} tensor, which cannot be saved: expected a dense one or "
            f"one of the layouts {', '.join(SPARSE)}. Convert it with to_dense()."
        )
    coalesced = rows[0] == "coo" and tensor.is_coalesced()
    return Record(name, kind, tensor.requires_grad, rows[0], tuple(tensor.shape), coalesced)


def record_to_json(record: Record) -> dict[str, object]:
    """Return a record as JSON values, without what is plain."""
    values: dict[str, object] = {
        "requires_grad": record.requires_grad,
        "sparse": record.sparse,
        "shape": list(record.shape),
        "coalesced": record.coalesced,
    }
    return {"name": record.name, "kind": record.kind, **{k: v for k, v in values.items() if v}}


def record_from_json(saved: object) -> Record:
    """Return the record that record_to_json wrote; raises CheckpointError."""
    given = saved if is_object(saved) else dict[str, Any]()
    name, kind, sparse = (given.get(k, "") for k in ("name", "kind", "sparse"))
    shape = given.get("shape", [])
    sound = (
        isinstance(name, str)
        and is_path(name)
        and kind in KINDS
        and (sparse == "" or sparse in SPARSE)
        and is_list(shape)
        and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    )
    if not sound:
        raise CheckpointError(f"the checkpoint lists the tensor {shown(saved)}, which is none.")
    grad, coalesced = given.get("requires_grad") is True, given.get("coalesced") is True
    return Record(name, kind, grad, sparse, tuple(shape), coalesced)


def _entries(record: Record, tensor: Tensor) -> list[Entry]:
    if not record.sparse:
        return [entry_of(record.name, tensor)]
    return [entry_of(name, part) for name, part in sparse_parts(record, tensor)]


def sparse_parts(record: Record, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return the dense parts of a sparse tensor by their names in the file."""
    methods = SPARSE[record.sparse][1]
    parts = [getattr(tensor, method)() for method in methods]
    return list(zip(record.parts, parts, strict=True))


def aliases_of(records: Iterable[Record], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {further name: first name} of tied tensors; sparse ones are stored by every name."""
    owners: dict[int, str] = {}
    dense = (r.name for r in records if not r.sparse)
    firsts = {name: owners.setdefault(id(tensors[name]), name) for name in dense}
    return {name: first for name, first in firsts.items() if name != first}


def info_of_tensor(tensor: Tensor) -> TensorInfo:
    """Return the shape and dtype of a tensor."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def read_whole(record: Record, file: TensorFile) -> Tensor:
    """Return a saved tensor, in memory of its own."""
    if not record.sparse:
        return file.read(record.name)
    return sparse_from(record, [file.read(name) for name in record.parts])


def sparse_from(record: Record, parts: list[Tensor]) -> Tensor:
    """Return a sparse tensor of its parts; raises CheckpointError where they are none."""
    try:
        return _assembled(record, parts)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{record.name} is no sound sparse tensor: {error}") from None


def _assembled(record: Record, parts: list[Tensor]) -> Tensor:
    *indices, values = parts
    if record.sparse == "coo":
        return _sparse.sparse_coo_tensor(
            indices[0], values, record.shape, is_coalesced=record.coalesced, check_invariants=True
        )
    rows, columns = indices
    layout = SPARSE[record.sparse][0]
    return _sparse.sparse_compressed_tensor(
        rows, columns, values, record.shape, layout=layout, check_invariants=True
    )


def as_parameter(tensor: Tensor, record: Record) -> Tensor:
    """Return a tensor as the model holds it."""
    if record.kind != "parameter":
        return tensor
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return nn.Parameter(tensor, requires_grad=record.requires_grad and differentiable)


def hollow(record: Record, info: TensorInfo) -> Tensor:
    """Return a tensor of the meta device as the model holds it: no values."""
    return as_parameter(torch.empty(info.shape, dtype=info.dtype, device="meta"), record)


def info_in(record: Record, file: TensorFile) -> TensorInfo:
    """Return the shape and dtype of a saved tensor."""
    if not record.sparse:
        return file.info(record.name)
    return TensorInfo(record.shape, file.info(record.parts[-1]).dtype)


def files_of(records: Iterable[Record]) -> list[str]:
    """Return the tensor files that hold the records."""
    used = {record.file for record in records}
    return [WEIGHTS, *([CONSTANTS] if CONSTANTS in used else [])]


def write_records(state: Mapping[str, Tensor], records: Iterable[Record], path: Path) -> None:
    """Write those of the records that belong into the file of this name."""
    mine = [record for record in records if record.file == path.name]
    aliases = aliases_of(mine, state)
    stored = [record for record in mine if record.name not in aliases]
    entries = [entry for r in stored for entry in _entries(r, state[r.name])]
    write_tensors(path, entries, aliases=aliases)


def shared(
    names: Iterable[str], owner: Callable[[str], object], make: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Return {name: tensor}; names of one owner share the tensor that the first of them makes."""
    made: dict[object, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name in names:
        key = owner(name)
        if key not in made:
            made[key] = make(name)
        out[name] = made[key]
    return out


def nan_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN."""
    return [name for name, tensor in tensors.items() if _has_nan(tensor)]


def _has_nan(tensor: Tensor) -> bool:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    values = tensor.detach()
    values = values._values() if values.layout is torch.sparse_coo else values
    if values.layout is not torch.strided or not values.numel():
        return False
    rows = values.reshape(1) if values.dim() == 0 else values
    step = max(1, NAN_CHUNK * len(rows) // rows.numel())
    return any(bool(torch.isnan(chunk).any()) for chunk in torch.split(rows, step))
