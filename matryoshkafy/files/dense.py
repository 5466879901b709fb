"""The tensors of a checkpoint where each stands whole in one file: read whole, or cut by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from matryoshkafy.dolls.slice import Cut, masked
from matryoshkafy.files.held import Held
from matryoshkafy.files.records import (
    Record,
    as_parameter,
    files_of,
    info_in,
    read_whole,
    write_records,
)
from matryoshkafy.files.tensors import TensorFile


class Dense:
    """The open tensor files of a checkpoint. Close it, or use it in a with statement."""

    def __init__(self, held: Held, records: Sequence[Record]) -> None:
        self._records = {record.name: record for record in records}
        self._stack = ExitStack()
        self._files: dict[str, TensorFile] = {}
        try:
            for name in files_of(records):
                file = TensorFile(held.path / name, held.file(name))
                self._files[name] = self._stack.enter_context(file)
        except BaseException:
            self._stack.close()
            raise

    def owner(self, name: str) -> Any:
        """Return what names of one tensor share."""
        file = self._records[name].file
        return file, self._files[file].aliases.get(name, name)

    def outline(self) -> dict[str, Tensor]:
        """Return every tensor on the meta device: shapes, dtypes and ties, without values."""
        made: dict[Any, Tensor] = {}
        for record in self._records.values():
            key = self.owner(record.name)
            if key not in made:
                info = info_in(record, self._files[record.file])
                hollow = torch.empty(info.shape, dtype=info.dtype, device="meta")
                made[key] = as_parameter(hollow, record)
        return {name: made[self.owner(name)] for name in self._records}

    def whole(self, name: str) -> Tensor:
        """Return a tensor as it was saved, a parameter where it was one."""
        record = self._records[name]
        return as_parameter(read_whole(record, self._files[record.file]), record)

    def cut(self, cut: Cut, *, zeros: bool) -> Tensor:
        """Return what a sub-model keeps of a tensor; zeros: with its structural zeros written."""
        record = self._records[cut.name]
        if record.sparse:
            return read_whole(record, self._files[record.file])
        tensor = self._files[record.file].read_slice(cut.name, cut.segments)
        return masked(tensor, cut.mask) if zeros else tensor

    def close(self) -> None:
        """Close the files; what they are held by stays open."""
        self._stack.close()

    def __enter__(self) -> Dense:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dense_files(state: Mapping[str, Tensor], records: Sequence[Record]) -> dict[str, Any]:
    """Return how each tensor file of a checkpoint is written."""
    return dict.fromkeys(files_of(records), partial(write_records, state, records))
