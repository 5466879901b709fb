"""A folder of transformers that holds every size once: what is read of it for one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from matryoshkafy.files.checkpoint import open_checkpoint
from matryoshkafy.files.held import Closing
from matryoshkafy.files.tensors import TensorFile
from matryoshkafy.natives.recipe import Foreign, NativeError
from matryoshkafy.natives.tree import Changes

KEY = "matryoshka"
"""Where config.json holds which fields each size changes."""
NAMES = "names.safetensors"
"""The names that the stock class has, without values: those stand in the files of the levels."""


def spare_file(size: int) -> str:
    """Return the file of what the traced path does not read, at a size."""
    return f"spare-{size}.safetensors"


def held_fields(changes: Mapping[int, Changes]) -> dict[str, object]:
    """Return what config.json holds: for every size, the fields that it changes."""
    return {
        "sizes": {
            str(size): [[list(field), value] for field, value in fields.items()]
            for size, fields in changes.items()
        }
    }


def fields_of(held: Foreign, size: int | None) -> tuple[int, dict[tuple[Foreign, ...], Foreign]]:
    """Return a size (None: the largest) and the fields that it changes; see `held_fields`.

    Raises NativeError for a configuration without sizes, and for a size that is none of them.
    """
    try:
        known = {int(k): {tuple(f): v for f, v in fields} for k, fields in held["sizes"].items()}
        largest = max(known)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise NativeError(
            "MatryoshkaConfig was given for a configuration that holds no sizes; expected a folder "
            'that matryoshkafy.save(doll, FOLDER, to="hf") wrote. Write it, or leave '
            "quantization_config out."
        ) from None
    wanted = largest if size is None else size
    if wanted not in known:
        raise NativeError(
            f"MatryoshkaConfig(size={size}) was given; expected one of "
            f"{', '.join(map(str, sorted(known)))}, the sizes of this folder."
        )
    return wanted, known[wanted]


class SizeTensors(Mapping[str, Tensor], Closing):
    """The tensors of one size by name, each read when it is asked for. Close it after use.

    Only the files of the levels up to the size are read, without their digests: each byte once.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        with ExitStack() as stack:
            found = stack.enter_context(open_checkpoint(folder, size=size, digests=False))
            self._held = stack.enter_context(found.tensors(size))
            spare = folder / spare_file(size)
            self._spare = stack.enter_context(TensorFile(spare)) if spare.is_file() else None
            self._stack = stack.pop_all()

    def __getitem__(self, name: str) -> Tensor:
        if self._spare is not None and name in self._spare.names:
            return self._spare.read(name)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        yield from {*self._held, *(() if self._spare is None else self._spare.names)}

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def close(self) -> None:
        self._stack.close()
