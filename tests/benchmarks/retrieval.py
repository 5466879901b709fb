"""Funnels against exact and approximate search at full size, on real texts.

    python -m tests.benchmarks.retrieval descriptions.parquet --cache FOLDER

20,000 descriptions of packages as documents, 2,000 held-out summaries as queries, 1,000 others to
tune on, the rest (with their documents) to train the rotation on; vectors by all-MiniLM-L6-v2
(`package_vectors.py`: encoded once, kept in the folder with the rotation). Timings are interleaved:
every round asks each method for the same queries, all at once and one at a time, on one thread.
Writes docs/results/retrieval.md and the plot beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from matryoshkafy.serving import Rotation, ShortIndex, Vectors, fit_rotation, funnel, tune
from matryoshkafy.serving.metrics import recall_of, reciprocal_rank_of
from matryoshkafy.serving.rotation import train_rotation
from matryoshkafy.serving.tune import Setting
from tests.benchmarks.package_vectors import SIZES, encoded, encoder_of, rows_of
from tests.benchmarks.scatter import scatter
from tests.benchmarks.speed import machine

PAGE = Path(__file__).parents[2] / "docs" / "results" / "retrieval.md"
DOCUMENTS, TEST, TUNE, K, ROUNDS, ALONE, STEPS = 20_000, 2_000, 1_000, 10, 5, 200, 800
# Within 0.2 points of the full size, with half of that for the step from one set to another.
LOSS = 0.001
Search = Callable[[Vectors], np.ndarray]


@dataclass(frozen=True)
class Method:
    """A way to search: its name, its multiply-adds per query, the search."""

    name: str
    products: float
    search: Search


@dataclass(frozen=True)
class Corpus:
    """Turned tables: documents, queries to test on and to tune on (query i asks for document i)."""

    documents: Vectors
    test: Vectors
    tuning: Vectors

    @property
    def tuning_rows(self) -> np.ndarray:
        """The documents of the tuning queries."""
        return np.arange(TEST, TEST + TUNE)


def corpora(data: str, cache: Path, model: str | None) -> dict[str, Corpus]:
    """Return the tables turned by principal directions, and by a trained rotation."""
    rows, encoder = rows_of(data), encoder_of(model)
    queries, documents = (
        encoded(encoder, rows[c].to_list(), cache, c) for c in ("summary", "description")
    )
    few = documents.rows(np.arange(DOCUMENTS))
    turns = {
        "principal directions": fit_rotation(few),
        "trained rotation": trained(queries, documents, cache),
    }
    return {
        name: Corpus(
            turn(few),
            turn(queries.rows(np.arange(TEST))),
            turn(queries.rows(np.arange(TEST, TEST + TUNE))),
        )
        for name, turn in turns.items()
    }


def trained(queries: Vectors, documents: Vectors, cache: Path) -> Rotation:
    """Return the rotation learned from the pairs that are neither tested nor tuned on."""
    file = cache / f"rotation-{queries.model}-{STEPS}.safetensors"
    if not file.exists():
        rest = np.arange(TEST + TUNE, len(queries))
        short = (16, 24, 32, 48, 64, queries.width)
        pairs = [Vectors(v.values[rest], short, v.model) for v in (queries, documents)]
        found = train_rotation(*pairs, np.arange(len(rest)), steps=STEPS)
        save_file({"matrix": found.matrix}, file)
    return Rotation(load_file(file)["matrix"], queries.model)


def chosen(corpus: Corpus, table: list[Setting]) -> list[Setting]:
    """Return the cheapest settings that lose at most 0.1 and 1 point on the tuning queries."""
    full = full_recall(corpus)
    return [next(s for s in table if s.recall >= full - loss) for loss in (LOSS, 0.01)]


def methods(corpora_: dict[str, Corpus], tables: dict[str, list[Setting]]) -> list[Method]:
    """Return exact and HNSW search at full size, then funnels."""
    corpus = corpora_["trained rotation"]
    documents, asked = corpus.documents, corpus.test
    full = documents.at(documents.width)
    flat = faiss.IndexFlatIP(documents.width)
    flat.add(full)
    out = [Method("FAISS exact, 384", float(full.size), lambda q: flat.search(q.at(384), K)[1])]
    graph = faiss.IndexHNSWFlat(documents.width, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 200
    graph.add(full)
    out += [hnsw(graph, asked, effort) for effort in (64, 128, 256)]
    for name, table in tables.items():
        for setting in chosen(corpora_[name], table):
            out.append(staged(corpora_[name], setting.sizes, setting.keep, None, name))
    for kind, sizes, keep, effort in INDEXED:
        index = ShortIndex.of(documents, sizes[0], kind=kind, effort=effort)
        out.append(staged(corpus, sizes, keep, index, f"{kind} ({effort})"))
    return out


# Chosen on the tuning queries. The trained rotation's 64 units find as much as all 384, so the
# stages behind codes of 46 units end there.
INDEXED = (
    ("hnsw", (48, 384), (200, K), 200),
    ("hnsw", (64, 384), (200, K), 200),
    ("ivf", (48, 384), (200, K), 96),
    ("ivf", (64, 384), (200, K), 128),
    ("codes", (46, 64), (100, K), 23),
    ("codes", (64, 384), (100, K), 32),
    ("ivf-codes", (64, 96), (40, K), 20),
    ("ivf-codes", (64, 384), (25, K), 20),
    ("ivf-codes", (64, 384), (50, K), 24),
    ("usearch", (64, 384), (200, K), 256),
)


def full_recall(corpus: Corpus) -> float:
    """Return the recall of the full size, exactly, on the tuning queries."""
    found = funnel(corpus.tuning, corpus.documents, sizes=[SIZES[-1]], keep=[K])
    return recall_of(found.ids, corpus.tuning_rows)


def hnsw(graph: faiss.IndexHNSWFlat, asked: Vectors, effort: int) -> Method:
    """Return search in a graph over the whole vectors."""

    def search(queries: Vectors) -> np.ndarray:
        graph.hnsw.efSearch = effort
        return graph.search(queries.at(queries.width), K)[1]

    faiss.cvar.hnsw_stats.reset()
    search(asked)
    compared = faiss.cvar.hnsw_stats.ndis / len(asked)
    return Method(f"FAISS HNSW ({effort}), 384", compared * asked.width, search)


def staged(
    corpus: Corpus,
    sizes: tuple[int, ...],
    keep: tuple[int, ...],
    index: ShortIndex | None,
    about: str,
) -> Method:
    """Return a funnel; its multiply-adds are counted on the test queries."""
    documents = corpus.documents

    # A query is turned before it is asked: every method gets the same one, a row of test.
    def search(queries: Vectors) -> np.ndarray:
        return funnel(queries, documents, sizes=sizes, keep=keep, index=index).ids

    cost = funnel(corpus.test, documents, sizes=sizes, keep=keep, index=index).products
    return Method(f"{about}: {stages(sizes, keep)}", cost, search)


def timed(method: Method, queries: Vectors, single: list[Vectors]) -> tuple[float, float]:
    """Return microseconds per query: all at once, and one at a time."""
    started = time.perf_counter()
    method.search(queries)
    batch = (time.perf_counter() - started) / len(queries)
    started = time.perf_counter()
    for one in single:
        method.search(one)
    return batch * 1e6, (time.perf_counter() - started) / len(single) * 1e6


def stages(sizes: tuple[int, ...], keep: tuple[int, ...]) -> str:
    """Return 16:1000 > 384:10."""
    return " > ".join(f"{s}:{k}" for s, k in zip(sizes, keep, strict=True))


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    found = corpora(arguments.data, Path(arguments.cache), arguments.model)
    started = time.process_time()
    tables = {name: tune(c.tuning, c.documents, c.tuning_rows, k=K) for name, c in found.items()}
    spent = (time.process_time() - started) / len(tables)
    rows = methods(found, tables)
    queries = {m.name: queries_of(m, found) for m in rows}
    times: dict[str, list[tuple[float, float]]] = {m.name: [] for m in rows}
    for _ in range(arguments.rounds):
        for method in rows:
            times[method.name].append(timed(method, *queries[method.name]))
    asked = {name: of[0] for name, of in queries.items()}
    PAGE.write_text(page(rows, times, asked, (found, tables, spent)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def queries_of(method: Method, found: dict[str, Corpus]) -> tuple[Vectors, list[Vectors]]:
    """Return the test queries in the basis of a method, and the first of them one by one."""
    first = method.name.startswith("principal")
    test = found["principal directions" if first else "trained rotation"].test
    return test, [test.rows(np.array([i])) for i in range(ALONE)]


Tables = tuple[dict[str, Corpus], dict[str, list[Setting]], float]


def page(
    rows: list[Method],
    times: dict[str, list[tuple[float, float]]],
    asked: dict[str, Vectors],
    about: Tables,
) -> str:
    """Return the page of results, and draw its plot."""
    found, tables, spent = about
    relevant = np.arange(TEST)
    base = times[rows[0].name]
    whole = rows[0].products
    lines = [
        "# Retrieval",
        "",
        f"{DOCUMENTS:,} documents, {TEST:,} held-out queries (description and summary of Debian "
        "packages), all-MiniLM-L6-v2, texts cut at 64 tokens. `size:kept` are the stages of a "
        f"funnel. Rotations keep every cosine at 384; the trained one learned from the other "
        f"packages' pairs. Stages without an index were tuned on {TUNE:,} other queries to lose at "
        "most 0.1, then at most 1 point; the settings with an index were chosen on them by hand. "
        f"{machine('wall')}; medians of {len(base)} interleaved rounds, ratios pair by pair with "
        "their least and largest.",
        "",
        "`python -m tests.benchmarks.retrieval DESCRIPTIONS.parquet --cache FOLDER`",
        "",
        "| search | Recall@10 | MRR@10 | multiply-adds | of exact | µs a query, all at once | "
        "one at a time | times faster than exact, all at once | one at a time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    drawn: dict[str, list[tuple[float, float]]] = {"measured": []}
    for method in rows:
        ids, mine = method.search(asked[method.name]), times[method.name]
        recall = 100 * recall_of(ids, relevant)
        cells = [
            f"{recall:.2f}",
            f"{100 * reciprocal_rank_of(ids, relevant):.2f}",
            f"{method.products:,.0f}",
            f"1/{whole / method.products:.0f}",
            *(f"{statistics.median(t[i] for t in mine):.0f}" for i in (0, 1)),
            *(spread([b[i] / t[i] for b, t in zip(base, mine, strict=True)]) for i in (0, 1)),
        ]
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
        drawn["measured"].append((method.products, recall))
    lines += ["", *prefixes(found), "", *frontiers(tables, spent)]
    drawn |= {f"tuned, {name}": curve(table) for name, table in tables.items()}
    plot = PAGE.with_name("retrieval.svg")
    plot.write_text(
        scatter(drawn, "multiply-adds per query", "Recall@10, %"),
        encoding="utf-8",
    )
    return "\n".join([*lines, ""])


def curve(table: list[Setting]) -> list[tuple[float, float]]:
    """Return the points of a tuned table."""
    return [(s.products, 100 * s.recall) for s in table if s.recall > 0.6]


def prefixes(found: dict[str, Corpus]) -> list[str]:
    """Return the table of every prefix alone."""
    lines = ["Every prefix alone, exactly (Recall@10 / MRR@10):", "", "| size | plain rotation | "
             "trained rotation |", "|---|---:|---:|"]  # fmt: skip
    for size in SIZES:
        cells = []
        for corpus in found.values():
            ids = funnel(corpus.test, corpus.documents, sizes=[size], keep=[K]).ids
            relevant = np.arange(TEST)
            scores = recall_of(ids, relevant), reciprocal_rank_of(ids, relevant)
            cells.append(" / ".join(f"{100 * s:.1f}" for s in scores))
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


def frontiers(tables: dict[str, list[Setting]], spent: float) -> list[str]:
    """Return the end of the table that tune gave."""
    table = tables["trained rotation"]
    lines = [
        "![Recall against multiply-adds](retrieval.svg)",
        "",
        f"`tune` judges 661 settings on {TUNE:,} queries in {spent:.0f} CPU seconds and returns "
        f"{len(table)}, each better than all cheaper ones. The last of them, trained rotation:",
        "",
        "| stages | Recall@10 | MRR@10 | multiply-adds |",
        "|---|---:|---:|---:|",
    ]
    return lines + [
        f"| {stages(s.sizes, s.keep)} | {100 * s.recall:.1f} | {100 * s.reciprocal_rank:.1f} | "
        f"{s.products:,.0f} |"
        for s in table[-12:]
    ]


def spread(ratios: list[float]) -> str:
    """Return a median with the least and the largest."""
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


if __name__ == "__main__":
    main()
