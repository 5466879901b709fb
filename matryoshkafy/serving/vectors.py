"""Vectors: one table of nested vectors, in which every size is a prefix of each row.

A prefix is compared by cosine: it is cut first and normalised then. Cutting a normalised vector and
comparing without normalising again is the common mistake (it ranks by how much of its length a row
keeps in front), so rows are stored as the model gave them, and their lengths beside them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, numpy, safe_open

from matryoshkafy.errors import MatryoshkafyError

Floats = NDArray[np.float32]
FORMAT = "1"


class ServingError(MatryoshkafyError):
    """Vectors, lists or thresholds that do not fit each other, or an engine that is not there."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """A table of N nested vectors.

    Args:
        values: float [N, D], a row a vector, as the model gave it (not normalised).
        sizes: the ladder, ascending; the last is D.
        model: who made the vectors, such as `digest_of(weights)`. Tables of two models are never
            compared.

    Raises:
        ServingError: where the table is no matrix of real numbers, holds NaN or infinities, has
            rows of length zero, or where the sizes do not ascend to D.
    """

    values: Floats
    sizes: tuple[int, ...]
    model: str = ""

    def __post_init__(self) -> None:
        values = _floats(self.values)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        self._check()

    def _check(self) -> None:
        if self.values.ndim != 2 or not self.values.size:
            raise ServingError(
                f"vectors of shape {list(self.values.shape)} were given; expected [rows, units]"
            )
        sizes = self.sizes
        ascending = all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
        if not sizes or not ascending or sizes[0] < 1 or sizes[-1] != self.width:
            raise ServingError(
                f"sizes {list(sizes)} were given for vectors of {self.width} units; expected "
                f"ascending sizes that end at {self.width}"
            )
        bad = np.flatnonzero(~np.isfinite(self.values).all(axis=1))
        if bad.size:
            raise ServingError(
                f"row {bad[0]} (of {bad.size} such rows) holds NaN or an infinity; encode it again "
                "or leave it out"
            )
        empty = np.flatnonzero(self.squares[:, 0] == 0)
        if empty.size:
            raise ServingError(
                f"row {empty[0]} (of {empty.size} such rows) is zero in its first {sizes[0]} "
                "units, so it has no direction at that size; leave it out, or begin the ladder "
                "at a larger size"
            )

    @property
    def width(self) -> int:
        """The units of a row at full size."""
        return int(self.values.shape[1])

    def __len__(self) -> int:
        return int(self.values.shape[0])

    @cached_property
    def squares(self) -> NDArray[np.float64]:
        """The squared length of each row's prefix, [N, sizes]: one pass, in float64."""
        edges = [0, *self.sizes[:-1]]
        parts = np.add.reduceat(np.square(self.values, dtype=np.float64), edges, axis=1)
        return np.cumsum(parts, axis=1)

    @cached_property
    def inverse_lengths(self) -> Floats:
        """1 / |row's prefix|, [N, sizes]."""
        return (1.0 / np.sqrt(self.squares)).astype(np.float32)

    def level(self, size: int) -> int:
        """Return the index of a size; raises `ServingError` that lists the sizes."""
        if size not in self.sizes:
            known = ", ".join(map(str, self.sizes))
            raise ServingError(f"size {size} was asked for; these vectors have the sizes {known}")
        return self.sizes.index(size)

    def at(self, size: int, rows: slice = slice(None)) -> Floats:
        """Return the vectors of a size, [rows, size]: cut, then normalised."""
        level = self.level(size)
        return self.values[rows, :size] * self.inverse_lengths[rows, level : level + 1]

    def front(self, size: int) -> Floats:
        """Return `at(size)`, kept beside the table: what every search begins with."""
        if size not in self._fronts:
            self._fronts[size] = self.at(size)
        return self._fronts[size]

    @cached_property
    def _fronts(self) -> dict[int, Floats]:
        return {}

    def rows(self, index: NDArray[np.int64]) -> Vectors:
        """Return the table of some rows."""
        return Vectors(self.values[index], self.sizes, self.model)

    def check_against(self, other: Vectors) -> None:
        """Raise `ServingError` where another table is of another model or another width."""
        if self.model != other.model:
            raise ServingError(
                f"the vectors of model {self.model or 'unknown'!r} were compared with those of "
                f"{other.model or 'unknown'!r}: their spaces have nothing in common. Encode both "
                "with one model, or with sizes of one family"
            )
        if self.width != other.width:
            raise ServingError(
                f"vectors of {self.width} units were compared with vectors of {other.width}; "
                "encode both at one size, or cut the longer table"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as one safetensors file, whole or not at all."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        about = {"format": FORMAT, "sizes": ",".join(map(str, self.sizes)), "model": self.model}
        try:
            save = cast(Any, numpy.save_file)  # pyright: ignore[reportUnknownMemberType]
            save({"vectors": self.values}, beside, metadata=about)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Vectors:
        """Read a table that `save` wrote; raises `ServingError` for anything else."""
        try:
            opened = cast(Any, safe_open)  # its module says nothing of types
            with opened(os.fspath(path), "np") as file:
                about: dict[str, str] = file.metadata() or {}
                values = file.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            raise ServingError(
                f"{os.fspath(path)} is no table of vectors ({error}); give a file that "
                "Vectors.save wrote"
            ) from error
        if about.get("format") != FORMAT:
            raise ServingError(
                f"{os.fspath(path)} has format {about.get('format')!r}, this version reads {FORMAT}"
            )
        sizes = tuple(int(size) for size in about["sizes"].split(","))
        return Vectors(values, sizes, about["model"])


def _floats(values: Any) -> Floats:
    try:
        given = np.asarray(values)
    except (ValueError, RuntimeError) as error:
        raise ServingError(
            f"vectors were given as {type(values).__name__} ({error}); expected a matrix of "
            "numbers, of a tensor tensor.detach().numpy()"
        ) from error
    if given.dtype.kind not in "fiub":
        raise ServingError(f"vectors of {given.dtype} were given; expected real numbers")
    return np.ascontiguousarray(given, dtype=np.float32)


def check_relevant(relevant: NDArray[np.int64], queries: Vectors, documents: Vectors) -> None:
    """Raise `ServingError` where `relevant` does not name a row of documents for each query."""
    rows = np.asarray(relevant)
    if rows.shape != (len(queries),):
        raise ServingError(
            f"{len(rows) if rows.ndim else 1} relevant documents were given for {len(queries)} "
            "queries; expected one each"
        )
    whole = rows.dtype.kind in "iu"
    bad = rows[(rows < 0) | (rows >= len(documents))] if whole else rows
    if bad.size:
        raise ServingError(
            f"relevant holds {bad.tolist()[0]!r}; expected rows of the documents' table, integers "
            f"from 0 to {len(documents) - 1}"
        )


def digest_of(*parts: bytes | NDArray[np.generic]) -> str:
    """Return 16 hexadecimal digits that name bytes and arrays: a `model` for `Vectors`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
