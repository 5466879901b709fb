"""The tensors of a checkpoint where each stands whole in one file: read whole, or cut by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from matryoshkafy.dolls.cuts import Cut, completed
from matryoshkafy.files.held import Held
from matryoshkafy.files.records import (
    Record,
    as_parameter,
    files_of,
    hollow,
    info_in,
    read_whole,
    shared,
    write_records,
)
from matryoshkafy.files.tensors import OpenFiles


class Dense(OpenFiles):
    """The open tensor files of a checkpoint."""

    def __init__(self, held: Held, records: Sequence[Record]) -> None:
        self._records = {record.name: record for record in records}
        super().__init__(held, files_of(records))

    def owner(self, name: str) -> Any:
        """Return what names of one tensor share."""
        file = self._records[name].file
        return file, self._files[file].aliases.get(name, name)

    def outline(self) -> dict[str, Tensor]:
        """Return every tensor on the meta device: shapes, dtypes and ties, without values."""
        return shared(self._records, self.owner, self._hollow)

    def _hollow(self, name: str) -> Tensor:
        record = self._records[name]
        return hollow(record, info_in(record, self._files[record.file]))

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
        return completed(tensor, cut) if zeros else tensor


def dense_files(state: Mapping[str, Tensor], records: Sequence[Record]) -> dict[str, Any]:
    """Return how each tensor file of a checkpoint is written."""
    return dict.fromkeys(files_of(records), partial(write_records, state, records))
