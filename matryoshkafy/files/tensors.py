"""safetensors files, written and read one tensor at a time.

Files are read with plain reads instead of a memory map, whose pages would count as memory, and
nothing in a header is believed before it is checked.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import check_file_name
from matryoshkafy.files.header import (
    MAX_HEADER,
    PAIRS,
    Entry,
    Spot,
    TensorFileError,
    check_header,
    header_of,
    what_else,
)
from matryoshkafy.files.held import Closing, Held
from matryoshkafy.files.json_text import is_object, parse_json, shown
from matryoshkafy.graph.nodes import TensorInfo

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 16 * 2**20
CHUNK = 16 * 2**20
# Values are moved as integers of the same size, for which torch has every operation.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Segments = Sequence[tuple[int, int]]
Cut = Sequence[Segments | None]


def entry_of(name: str, tensor: Tensor) -> Entry:
    """Return the entry of a tensor that is already there."""
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_tensors(
    path: str | os.PathLike[str],
    entries: Iterable[Entry],
    *,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file that holds one tensor in memory at a time.

    entries: every tensor once, whatever its strides or device. aliases: further names of tied
    tensors, `{name: name in entries}`; TensorFile resolves them, other readers do not see them.
    Raises TensorFileError for a name twice, an alias of nothing, a dtype that safetensors lacks, or
    a supplied tensor that is not what its entry says.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header = header_of(ordered, dict(aliases or {}))
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for entry in ordered:
            _write_tensor(file, entry)


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    tensor = entry.supply().detach()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise TensorFileError(
            f"{entry.name} turned out as {tensor.dtype} of shape {tuple(tensor.shape)}, but "
            f"{entry.dtype} of shape {entry.shape} was announced."
        )
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise TensorFileError(
            f"{entry.name} is a {tensor.layout} tensor on {tensor.device}: dense "
            f"tensors with values are expected."
        )
    tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    file.write(_bytes(torch.view_as_real(tensor) if tensor.is_complex() else tensor))


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous real tensor, to be read or written in place."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile(Closing):
    """An open safetensors file: names and shapes at once, values when asked for.

    handle: the descriptor of the file where it is open already; it stays the caller's. Raises
    TensorFileError for a file that is not sound. Close it, or use it in a with statement.
    """

    def __init__(self, path: str | os.PathLike[str], handle: int | None = None) -> None:
        self.path = Path(path)
        if handle is None and not self.path.is_file():
            raise TensorFileError(f"{path} is no file. Give a .safetensors file.")
        self._lock = threading.Lock()
        try:
            opened = path if handle is None else os.dup(handle)
            self._file = open(opened, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise TensorFileError(f"cannot read {path}: {error.strerror}.") from error
        try:
            header = self._read_header()
            self._header = check_header(header, self._data_bytes())
        except MatryoshkafyError as error:
            self.close()
            raise TensorFileError(f"{path} is no sound safetensors file: {error}") from None
        self.aliases = self._header.aliases

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stored tensors, without aliases, in the order of the file."""
        return tuple(self._header.stored)

    def info(self, name: str) -> TensorInfo:
        """Return the shape and dtype of a tensor or alias."""
        stored = self._find(name)
        shape = stored.shape[:-1] if stored.meant in PAIRS.values() else stored.shape
        return TensorInfo(shape, stored.meant)

    def read(self, name: str) -> Tensor:
        """Return a tensor, by its name or alias, in memory of its own."""
        return self.read_slice(name, ())

    def read_slice(self, name: str, cut: Cut) -> Tensor:
        """Return part of a tensor, reading no more than the rows that it touches.

        cut: for each dim None (all of it) or segments (start, stop), which follow each other in
        the result; missing dims are whole. Beside the result it needs 2 * CHUNK bytes.
        """
        stored = self._find(name)
        cuts = _check_cut(name, cut, self.info(name).shape)
        cuts += [None] * (len(stored.shape) - len(cuts))
        pairs = zip(stored.shape, cuts, strict=True)
        kept = [n if c is None else sum(b - a for a, b in c) for n, c in pairs]
        out = torch.empty(kept, dtype=INTEGERS[stored.dtype.itemsize])
        if out.numel():
            self._fill(out, 8 + self._header_bytes + stored.begin, stored.shape, cuts)
        return _as_meant(out, stored, name)

    def close(self) -> None:
        self._file.close()

    def _find(self, name: str) -> Spot:
        stored = self._header.stored.get(self.aliases.get(name, name))
        if stored is None:
            raise TensorFileError(f"{self.path} holds no tensor {shown(name)}.")
        return stored

    def _data_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size - 8 - self._header_bytes

    def _read_header(self) -> bytes:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise TensorFileError(f"it has {size} bytes, too few for a header.")
        start = bytearray(min(size, 9))
        self._read_into(memoryview(start), 0)
        (self._header_bytes,) = struct.unpack("<Q", start[:8])
        if self._header_bytes > min(MAX_HEADER, size - 8) or bytes(start[8:]) != b"{":
            raise TensorFileError(what_else(bytes(start), self._header_bytes, size))
        header = bytearray(self._header_bytes)
        self._read_into(memoryview(header), 8)
        return bytes(header)

    def _read_into(self, target: memoryview, begin: int) -> None:
        while target:
            count = self._read_some(target, begin)
            if not count:
                raise TensorFileError(f"{self.path} ended early: it was cut while being read.")
            target, begin = target[count:], begin + count

    def _read_some(self, target: memoryview, begin: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], begin)
        with self._lock:
            self._file.seek(begin)
            return self._file.readinto(target) or 0

    def _fill(
        self, out: Tensor, begin: int, shape: tuple[int, ...], cuts: list[Segments | None]
    ) -> None:
        if all(cut is None for cut in cuts):
            self._read_into(_bytes(out), begin)
            return
        row_bytes = math.prod(shape[1:]) * out.element_size()
        done = 0
        for start, stop in cuts[0] or [(0, shape[0])]:
            rows = out[done : done + stop - start]
            self._fill_rows(rows, begin + start * row_bytes, (stop - start, *shape[1:]), cuts[1:])
            done += stop - start

    def _fill_rows(
        self, out: Tensor, begin: int, shape: tuple[int, ...], cuts: list[Segments | None]
    ) -> None:
        row_bytes = math.prod(shape[1:]) * out.element_size()
        if all(cut is None for cut in cuts):
            self._read_into(_bytes(out), begin)
        elif row_bytes > CHUNK:
            for i, row in enumerate(out):
                self._fill(row, begin + i * row_bytes, shape[1:], cuts)
        else:
            self._fill_chunks(out, begin, shape, cuts)

    def _fill_chunks(
        self, out: Tensor, begin: int, shape: tuple[int, ...], cuts: list[Segments | None]
    ) -> None:
        row_bytes = math.prod(shape[1:]) * out.element_size()
        step = max(1, min(len(out), CHUNK // row_bytes))
        scratch = _scratch((step, *shape[1:]), out.dtype)
        for row in range(0, len(out), step):
            chunk = scratch[: min(step, len(out) - row)]
            self._read_into(_bytes(chunk), begin + row * row_bytes)
            out[row : row + step].copy_(_select(chunk, cuts))


class OpenFiles(Closing):
    """Tensor files of a folder that is held, open together, by name."""

    def __init__(self, held: Held, names: Iterable[str]) -> None:
        with ExitStack() as stack:
            self._files = {
                name: stack.enter_context(TensorFile(held.path / name, held.file(name)))
                for name in names
            }
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


class TensorFolder(Closing):
    """The tensors of a folder (one file, or shards and their index), or of one such file.

    Raises TensorFileError or FolderError for files that are not sound or lie elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: dict[str, TensorFile] = {}
        try:
            self._by_name = self._open(_main_file(self.path))
        except BaseException:
            self.close()
            raise
        self.aliases = {
            alias: name
            for file in self._files.values()
            for alias, name in file.aliases.items()
            if self._by_name.get(name) is file
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stored tensors, without aliases."""
        return tuple(self._by_name)

    def read(self, name: str) -> Tensor:
        """Return a tensor, by its name or alias, in memory of its own."""
        file = self._by_name.get(self.aliases.get(name, name))
        if file is None:
            raise TensorFileError(f"{self.path} holds no tensor {shown(name)}.")
        return file.read(name)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, main: Path) -> dict[str, TensorFile]:
        if main.suffix != ".json":
            self._files[main.name] = TensorFile(main)
            return dict.fromkeys(self._files[main.name].names, self._files[main.name])
        by_name: dict[str, TensorFile] = {}
        for name, shard in _read_index(main).items():
            if shard not in self._files:
                self._files[shard] = TensorFile(main.parent / shard)
            by_name[name] = self._files[shard]
            by_name[name].info(name)
        return by_name


def _main_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (SINGLE, SHARDED):
        if (path / name).is_file():
            return path / name
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return single[0]
    pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(s))
    hint = f" {pickles[0]} is a pickle, which is not read: convert it." if pickles else ""
    raise TensorFileError(f"{path} holds neither {SINGLE} nor {SHARDED}.{hint}")


def _read_index(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        index = parse_json(file.read(MAX_INDEX + 1), str(path))
    shards: object = index.get("weight_map") if is_object(index) else None
    if not is_object(shards) or not shards:
        raise TensorFileError(f"{path} has no weight_map from tensor names to files: damaged.")
    for name, shard in shards.items():
        check_file_name(shard, f"the file of {shown(name)} in {path}")
        if not shard.endswith(".safetensors"):
            raise TensorFileError(f"{path} keeps {shown(name)} in {shard}, no .safetensors file.")
    return shards


def _check_cut(name: str, cut: Cut, shape: tuple[int, ...]) -> list[Segments | None]:
    if len(cut) > len(shape):
        raise TensorFileError(f"{name} has {len(shape)} dims, but {len(cut)} are to be cut.")
    for segments, n in zip(cut, shape, strict=False):
        for start, stop in segments or ():
            if not 0 <= start <= stop <= n:
                raise TensorFileError(
                    f"{name} has {n} indices in a dim of which {start} to {stop} are asked for."
                )
    return [
        None if segments is None or list(segments) == [(0, n)] else list(segments)
        for segments, n in zip(cut, shape, strict=False)
    ]


def _scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Memory of its own instead of malloc's, where each freed chunk would leave a hole between the
    # results: a third of the peak of a streamed load.
    count = math.prod(shape)
    return torch.frombuffer(mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def _select(chunk: Tensor, cuts: list[Segments | None]) -> Tensor:
    for dim, segments in enumerate(cuts, start=1):
        if segments is None:
            continue
        if len(segments) == 1:
            start, stop = segments[0]
            chunk = chunk.narrow(dim, start, stop - start)
        else:
            indices = torch.cat([torch.arange(start, stop) for start, stop in segments])
            chunk = chunk.index_select(dim, indices)
    return chunk


def _as_meant(out: Tensor, stored: Spot, name: str) -> Tensor:
    if stored.dtype is torch.bool and out.numel() and int(out.max()) > 1:
        raise TensorFileError(f"{name} is of BOOL, but has bytes other than 0 and 1: damaged.")
    values = out.view(stored.dtype)
    return torch.view_as_complex(values) if stored.meant in PAIRS.values() else values
