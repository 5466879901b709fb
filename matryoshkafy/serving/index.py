"""ShortIndex: an approximate index over the shortest size, by FAISS or usearch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matryoshkafy.serving.vectors import Floats, ServingError, Vectors

# Values of a code of four bits: as many rows are needed to learn them from.
CODES = 16
# Rows that a scan of codes reads at a time, and rows of a cell: small cells leave it half empty.
BLOCK = 128
CELL = 5 * BLOCK
# FAISS's way of one query after the other, nearest cell first: few of the later rows get on a list.
NEAREST_FIRST = 11
# Rounds in which OPQ turns the units and rounds them.
TURNS = 15
# Ids [queries, k], and the multiply-adds of a query as the engine counted them.
Found = tuple[NDArray[np.int64], float]
Search = Callable[[Floats, int], Found]


class Build(Protocol):
    """Makes the search of one kind of index: vectors, effort -> search."""

    def __call__(self, vectors: Floats, effort: int) -> Search: ...


@dataclass(frozen=True, eq=False)
class ShortIndex:
    """An approximate index of one size of a table.

    Args:
        size: which prefix it holds.
        search: (queries [Q, size], k) -> ids [Q, k], -1 where it found fewer than k; and the
            multiply-adds of a query.
        model: whose vectors it holds.
        rows: how many.
    """

    size: int
    search: Search
    model: str
    rows: int

    @staticmethod
    def of(documents: Vectors, size: int, *, kind: str = "hnsw", effort: int = 64) -> ShortIndex:
        """Build an index over the vectors of a size.

        Args:
            documents: the table.
            size: a rung of its ladder, usually the shortest.
            kind: "hnsw", "ivf", "codes" or "ivf-codes" (FAISS), or "usearch". Codes look at every
                row, by four bits for each few units ("fast scan"); ivf-codes at those of the
                nearest cells of some 600 rows, by four bits for two units.
            effort: how far a search looks: candidates of HNSW, cells of IVF, codes of a row (at
                most one for two units).

        Raises:
            ServingError: where the kind is unknown, its package is not installed, the effort is
                below 1, or there are too few rows to learn codes from.
        """
        if kind not in KINDS:
            raise ServingError(f"index {kind!r} was asked for; expected one of {', '.join(KINDS)}")
        least = CODES if "codes" in kind else 1
        if effort < 1 or len(documents) < least:
            raise ServingError(
                f"an index {kind!r} of {len(documents)} rows with effort={effort} was asked for; "
                f"expected {least} rows or more and an effort from 1 on. A search of few rows "
                "needs no index"
            )
        search = KINDS[kind](documents.at(size), effort)
        return ShortIndex(size, search, documents.model, len(documents))

    def check(self, documents: Vectors, size: int) -> None:
        """Raise `ServingError` where the index is not of this table's prefix."""
        mine, asked = (self.model, self.rows, self.size), (documents.model, len(documents), size)
        if mine != asked:
            raise ServingError(
                f"the index holds {self.rows} vectors of size {self.size} of model "
                f"{self.model or 'unknown'!r}; the search begins with {len(documents)} of size "
                f"{size} of {documents.model or 'unknown'!r}. Build it again for these"
            )


def installed(name: str, extra: str) -> Any:
    """Return a package by its name; raises `ServingError` that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ServingError(
            f"this needs {name}, which is not installed: pip install {extra}"
        ) from error


def _hnsw(vectors: Floats, effort: int) -> Search:
    faiss = installed("faiss", "faiss-cpu")
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    index.add(vectors)

    def search(queries: Floats, k: int) -> Found:
        index.hnsw.efSearch = max(effort, k)
        faiss.cvar.hnsw_stats.reset()
        ids = index.search(queries, k)[1]
        return ids, faiss.cvar.hnsw_stats.ndis * vectors.shape[1] / len(queries)

    return search


def _ivf(vectors: Floats, effort: int) -> Search:
    faiss = installed("faiss", "faiss-cpu")
    cells = min(len(vectors), int(4 * len(vectors) ** 0.5))
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(effort, cells)

    def search(queries: Floats, k: int) -> Found:
        faiss.cvar.indexIVF_stats.reset()
        ids = index.search(queries, k)[1]
        compared = faiss.cvar.indexIVF_stats.ndis / len(queries) + cells
        return ids, compared * vectors.shape[1]

    return search


def _codes(vectors: Floats, effort: int) -> Search:
    faiss = installed("faiss", "faiss-cpu")
    rows, size = vectors.shape
    count = max(1, min(effort, size // 2))
    # Codes are of as many units each; zeros make up what is missing.
    width = count * -(-size // count)
    index = faiss.IndexPQFastScan(width, count, 4, faiss.METRIC_INNER_PRODUCT)
    stored = _widened(vectors, width)
    index.train(stored)
    index.add(stored)

    def search(queries: Floats, k: int) -> Found:
        # A table of 16 products for each code, then an addition a code and row.
        return index.search(_widened(queries, width), k)[1], float(CODES * size + count * rows)

    return search


def _ivf_codes(vectors: Floats, effort: int) -> Search:
    faiss = installed("faiss", "faiss-cpu")
    rows, size = vectors.shape
    cells, width = max(1, rows // CELL), size + size % 2
    codes, metric = width // 2, faiss.METRIC_INNER_PRODUCT
    # Turned so that pairs of units share as little as they can (OPQ, Ge et al. 2013).
    turn, quantizer = faiss.OPQMatrix(width, codes), faiss.ProductQuantizer(width, codes, 4)
    turn.pq, turn.niter = quantizer, TURNS
    near = faiss.IndexFlatIP(width)
    inside = faiss.IndexIVFPQFastScan(near, width, cells, codes, 4, metric, BLOCK)
    inside.nprobe, inside.implem = min(effort, cells), NEAREST_FIRST
    index = faiss.IndexPreTransform(turn, inside)
    stored = _widened(vectors, width)
    index.train(stored)
    index.add(stored)

    def search(queries: Floats, k: int) -> Found:
        faiss.cvar.indexIVF_stats.reset()
        ids = index.search(_widened(queries, width), k)[1]
        compared = faiss.cvar.indexIVF_stats.ndis / len(queries)
        return ids, float((width + cells + CODES) * width + compared * codes)

    return search


def _widened(vectors: Floats, width: int) -> Floats:
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))


def _usearch(vectors: Floats, effort: int) -> Search:
    package = installed("usearch.index", "usearch")
    index = package.Index(ndim=vectors.shape[1], metric="ip", dtype="f32", expansion_search=effort)
    # One thread: rows that are added at the same time can miss each other, and are not found then.
    index.add(np.arange(len(vectors)), vectors, threads=1)

    def search(queries: Floats, k: int) -> Found:
        found = index.search(queries, k)
        ids = np.reshape(np.asarray(found.keys, dtype=np.int64), (len(queries), -1))
        return ids, found.computed_distances * vectors.shape[1] / len(queries)

    return search


KINDS: Mapping[str, Build] = {
    "hnsw": _hnsw,
    "ivf": _ivf,
    "codes": _codes,
    "ivf-codes": _ivf_codes,
    "usearch": _usearch,
}
