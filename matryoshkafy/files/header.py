"""The header of a safetensors file: written from entries, and checked before it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.json_text import is_list, is_object, parse_json, shown

MAX_HEADER = 32 * 2**20
MAX_DIMS = 64
# No dim of a model is longer; where another is 0 the bytes of the file do not limit it.
MAX_DIM = 2**40
# Our entry in the file's metadata: ties and complex types, which the format does not have.
EXTRA = "matryoshkafy"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Complex types without a code are stored as pairs of real numbers: one more dim, of length 2.
PAIRS = {"complex128": torch.complex128, "complex32": torch.complex32}
NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a pickle archive of torch.save"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy file"),
)


class TensorFileError(MatryoshkafyError):
    """A safetensors file that is damaged, hostile or cannot be written."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, shape and dtype now, its values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    supply: Callable[[], Tensor]


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies in its file, the shape and dtype there, and the dtype it stands for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int
    meant: torch.dtype


@dataclass(frozen=True)
class Header:
    """What a checked header says: the tensors, and further names of them."""

    stored: dict[str, Spot]
    aliases: dict[str, str]


def header_of(entries: list[Entry], aliases: dict[str, str]) -> bytes:
    """Return the header of a file that holds the entries in this order, padded to 8 bytes."""
    names = [entry.name for entry in entries]
    _check_names(names, aliases)
    pairs = {e.name: str(e.dtype)[6:] for e in entries if e.dtype in PAIRS.values()}
    extra = {key: item for key, item in (("aliases", aliases), ("complex", pairs)) if item}
    texts = {EXTRA: json.dumps(extra)} if extra else {}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **texts}}
    begin = 0
    for entry in entries:
        record, begin = _record(entry, begin)
        header[entry.name] = record
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _check_names(names: list[str], aliases: dict[str, str]) -> None:
    known = set(names)
    if len(known) < len(names) or known & {"", "__metadata__"} or known & aliases.keys():
        raise TensorFileError("two tensors have the same name, or one has a name not allowed.")
    for alias, name in aliases.items():
        if name not in known:
            raise TensorFileError(f"{alias!r} cannot be an alias of {name!r}: no such tensor.")


def _record(entry: Entry, begin: int) -> tuple[dict[str, object], int]:
    shape, dtype = _as_stored(entry.shape, entry.dtype)
    if dtype not in CODES:
        raise TensorFileError(
            f"{entry.name} is of {entry.dtype}, which safetensors cannot hold. Convert it to one "
            f"of {', '.join(str(known)[6:] for known in CODES)}."
        )
    end = begin + math.prod(shape) * dtype.itemsize
    record: dict[str, object] = {"dtype": CODES[dtype], "shape": list(shape)}
    record["data_offsets"] = [begin, end]
    return record, end


def _as_stored(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    if dtype in PAIRS.values():
        return (*shape, 2), dtype.to_real()
    return shape, dtype


def check_header(text: bytes, data_bytes: int) -> Header:
    """Return what a header says; raises TensorFileError unless it fits the bytes after it."""
    header = parse_json(text, "its header")
    if not is_object(header):
        raise TensorFileError("its header is no JSON object.")
    metadata = header.pop("__metadata__", {})
    if not _texts(metadata):
        raise TensorFileError("its __metadata__ is not a text for each name.")
    stored = {name: _check_record(name, record) for name, record in header.items()}
    _check_layout(stored, data_bytes)
    extra = _read_extra(metadata.get(EXTRA))
    _check_aliases(extra["aliases"], stored)
    pairs = {name: _pair(name, code, stored) for name, code in extra["complex"].items()}
    return Header({**stored, **pairs}, extra["aliases"])


def _check_record(name: str, record: object) -> Spot:
    fields = ("dtype", "shape", "data_offsets")
    if not is_object(record) or sorted(record) != sorted(fields):
        raise TensorFileError(f"tensor {shown(name)} has not just {', '.join(fields)}.")
    code, shape, offsets = (record[key] for key in fields)
    if not isinstance(code, str) or code not in DTYPES:
        raise TensorFileError(f"tensor {shown(name)} has the unknown dtype {shown(code)}.")
    # Where one dim is 0 the others could still overflow torch's arithmetic.
    sound = _are_counts(shape) and len(shape) <= MAX_DIMS and max(shape, default=0) <= MAX_DIM
    if not sound or math.prod(filter(None, shape)) >= 2**60:
        raise TensorFileError(f"tensor {shown(name)} has the shape {shown(shape)}.")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise TensorFileError(f"tensor {shown(name)} has the data_offsets {shown(offsets)}.")
    size, (begin, end) = math.prod(shape) * DTYPES[code].itemsize, offsets
    if end - begin != size:
        raise TensorFileError(
            f"tensor {shown(name)} of {code} and shape {shown(shape)} needs {size} bytes, but its "
            f"data_offsets {begin} to {end} hold {end - begin}."
        )
    return Spot(tuple(shape), DTYPES[code], begin, end, DTYPES[code])


def _are_counts(items: object) -> TypeGuard[list[int]]:
    return is_list(items) and all(type(n) is int and 0 <= n < 2**63 for n in items)


def _check_layout(stored: Mapping[str, Spot], data_bytes: int) -> None:
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            fault = "overlaps another" if tensor.begin < end else "leaves a hole before it"
            raise TensorFileError(f"tensor {shown(name)} {fault} at byte {tensor.begin}.")
        end = tensor.end
    if end != data_bytes:
        fault = "it is cut off" if end > data_bytes else "something was added"
        raise TensorFileError(f"its tensors end at byte {end} of {data_bytes}: {fault}.")


def _read_extra(text: str | None) -> dict[str, dict[str, str]]:
    empty: dict[str, dict[str, str]] = {"aliases": {}, "complex": {}}
    extra = parse_json((text or "{}").encode("utf-8", "replace"), f"its metadata {EXTRA}")
    if is_object(extra) and extra.keys() <= empty.keys() and all(map(_texts, extra.values())):
        return {**empty, **extra}
    raise TensorFileError(f"its metadata {EXTRA} is {shown(extra)}, expected {shown(empty)}.")


def _texts(items: object) -> TypeGuard[dict[str, str]]:
    return is_object(items) and all(isinstance(item, str) for item in items.values())


def _check_aliases(aliases: Mapping[str, str], stored: Mapping[str, Spot]) -> None:
    for alias, name in aliases.items():
        if name not in stored or alias in stored:
            raise TensorFileError(f"its alias {shown(alias)} is taken, or of no tensor.")


def _pair(name: str, code: str, stored: Mapping[str, Spot]) -> Spot:
    tensor, meant = stored.get(name), PAIRS.get(code)
    if tensor and meant and tensor.dtype is meant.to_real() and tensor.shape[-1:] == (2,):
        return replace(tensor, meant=meant)
    raise TensorFileError(f"its tensor {shown(name)} cannot be {shown(code)}.")


def what_else(start: bytes, header_bytes: int, size: int) -> str:
    """Return what a file of these first bytes probably is instead, and what to do."""
    for magic, what in NOT_SAFETENSORS:
        if start.startswith(magic):
            return f"it looks like {what}, which is not read. Convert it to safetensors."
    return (
        f"it names a header of {header_bytes} bytes, but has {size} bytes in all, or no header "
        f"starts there. Check that it was copied whole."
    )
