"""One small encoder for queries: documents by MiniLM, queries by a size of it.

    python -m tests.benchmarks.unequal descriptions.parquet --cache FOLDER [--steps 1500]
    python -m tests.benchmarks.unequal descriptions.parquet --cache FOLDER --doll DOLL
    python -m tests.benchmarks.unequal descriptions.parquet --cache FOLDER --query ENCODER

The size 192 of 384 (a quarter of the multiply-adds of the layers) is ordered, then distilled
towards MiniLM's own vectors on the summaries of packages that are not held out (a fifth is, by a
hash of the package's name, as in `distilled.py`); a killed run goes on. Or DOLL is the doll that
`distilled.py` made of MiniLM, or ENCODER a sentence-transformers folder of one of its sizes. The
linear map into MiniLM's space is fitted on summaries to train on, and both encoders are
written as one Router folder, which is then measured. Writes docs/results/unequal.md.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matryoshkafy_cli.family_texts import Texts as Family
from matryoshkafy_cli.text_encoders import TextEncoder, load_encoder
from torch.utils.flop_counter import FlopCounterMode

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.serving import Vectors, exact, fit_projection, save_router
from matryoshkafy.serving.metrics import ndcg_of, reciprocal_rank_of
from matryoshkafy.training import Recipe, Term, distil
from tests.benchmarks.package_vectors import LENGTH, encoded, encoder_of, minilm_folder, rows_of
from tests.benchmarks.speed import machine

PAGE = Path(__file__).parents[2] / "docs" / "results" / "unequal.md"
SMALL, DOCUMENTS, TEST, K, FEW, ROUNDS = 192, 20_000, 2_000, 10, 4_000, 5
CALIBRATION, FITTED = 256, 6_000


@dataclass(frozen=True)
class Texts:
    """All summaries and descriptions with MiniLM's vectors; the first `held` are held out."""

    summaries: list[str]
    descriptions: list[str]
    queries: Vectors
    documents: Vectors
    held: int


def read(data: str, cache: Path) -> Texts:
    """Return the texts with their vectors, encoded once."""
    rows, encoder = rows_of(data), encoder_of()
    columns = [rows[c].to_list() for c in ("summary", "description")]
    tables = [
        encoded(encoder, texts, cache, name)
        for texts, name in zip(columns, ("summary", "description"), strict=True)
    ]
    hashes = [int(hashlib.sha1(p.encode()).hexdigest(), 16) for p in rows["package"]]
    held = np.array([number % 5 == 0 for number in hashes])
    order = np.argsort(~held, kind="stable")
    texts = [[column[i] for i in order] for column in columns]
    return Texts(*texts, *(table.rows(order) for table in tables), int(held.sum()))


def distilled(texts: Texts, cache: Path, steps: int) -> Path:
    """Return the folder of the small encoder, trained where it is not there yet."""
    place = cache / f"query-{steps}"
    if (place / f"size-{SMALL}" / "config.json").is_file():
        return place / f"size-{SMALL}"
    encoder = load_encoder(minilm_folder(), LENGTH)
    learned = texts.summaries[texts.held :]
    sizes = [SMALL, encoder.embedder.model.config.hidden_size]
    doll = mk.convert(
        encoder.embedder, (), encoder.batch(learned[:2]), sizes=sizes, nesting="sliced"
    )
    doll.eval()
    few = [encoder.batch(learned[i : i + 32]) for i in range(0, CALIBRATION, 32)]
    mk.order(doll, few, by="contribution")
    teacher = torch.from_numpy(texts.queries.values[texts.held :])
    recipe = Recipe(
        steps, 64, 5e-4, terms=(Term("cosine"),), weights={SMALL: 0.95, sizes[1]: 0.05}, save=100
    )
    print(distil(doll, teacher, learned, recipe, collate=encoder.batch, folder=place / "run"))
    return cut(doll, encoder, place)


def cut(doll: Doll, encoder: TextEncoder, place: Path) -> Path:
    """Write the small size in MiniLM's own class."""
    folder = place / f"size-{SMALL}"
    if not (folder / "config.json").is_file():
        Family(encoder, ["a text"], ["another"]).write(doll, SMALL, folder)
    return folder


def of_doll(path: Path, cache: Path) -> Path:
    """Return the folder of the small size of a doll of MiniLM that was distilled before."""
    doll, encoder = mk.load(path), load_encoder(minilm_folder(), LENGTH)
    assert isinstance(doll, Doll)
    encoder.embedder.load_state_dict(doll.state_dict())
    return cut(doll.eval(), encoder, cache / f"query-{path.parent.name}-{path.name}")


def routed(texts: Texts, query: Path, cache: Path) -> Any:
    """Return the Router of the small encoder and MiniLM."""
    target = cache / f"router-{query.parent.name}-{query.name}"
    if not (target / "modules.json").is_file():
        rows = slice(texts.held, texts.held + FITTED)
        small = encoder_of(str(query)).encode(texts.summaries[rows], show_progress_bar=False)
        projection = fit_projection(small, texts.queries.values[rows])
        save_router(target, query=query, document=minilm_folder(), projection=projection)
    return encoder_of(str(target))


def flops(encoder: TextEncoder, texts: list[str]) -> float:
    """Return the multiply-adds of a text."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for text in texts:
            encoder.embedder(**encoder.batch([text]))
    return counter.get_total_flops() / 2 / len(texts)


def milliseconds(encoders: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return the median time of one query alone, tokens and all, of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            for text in texts:
                encoder.encode_query([text], show_progress_bar=False)
            times[name].append((time.perf_counter() - started) * 1000 / len(texts))
    return {name: statistics.median(found) for name, found in times.items()}


def scores(queries: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Return MRR@10 and NDCG@10 in percent; query i asks for document i."""
    width = queries.shape[1]
    asked, given = (Vectors(v, (width,), "one space") for v in (queries, documents))
    ids, relevant = exact(asked, given, size=width, k=K).ids, np.arange(len(queries))
    return 100 * reciprocal_rank_of(ids, relevant), 100 * ndcg_of(ids, relevant)


def main() -> None:
    """Train what is not there, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--query", type=Path)
    parser.add_argument("--doll", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = Path(options.cache)
    texts = read(options.data, cache)
    found = of_doll(options.doll, cache) if options.doll else options.query
    query = found or distilled(texts, cache, options.steps)
    router, small = routed(texts, query, cache), encoder_of(str(query))
    PAGE.write_text(page(texts, router, small, query), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def page(texts: Texts, router: Any, small: Any, query: Path) -> str:
    """Measure, and return the page."""
    asked = texts.summaries[:TEST]
    by_router = router.encode_query(asked, show_progress_bar=False)
    by_small = small.encode(asked, show_progress_bar=False)
    documents = texts.documents.values[:DOCUMENTS]
    few = small.encode(texts.descriptions[:FEW], show_progress_bar=False)
    large = texts.queries.values[:TEST]
    rows = {
        "both by the large size": (scores(large, documents), scores(large, documents[:FEW])),
        "queries by the small, documents by the large": (
            scores(by_router, documents), scores(by_router, documents[:FEW]),
        ),
        "both by the small size": (None, scores(by_small, few)),
    }  # fmt: skip
    encoders = {
        "small": load_encoder(query, LENGTH),
        "large": load_encoder(minilm_folder(), LENGTH),
    }
    cost = {name: flops(e, asked[:200]) for name, e in encoders.items()}
    spent = milliseconds({"small": router, "large": encoder_of()}, asked[:100])
    whole = rows["both by the large size"]
    lines = [
        "# One small encoder for queries",
        "",
        "`python -m tests.benchmarks.unequal DESCRIPTIONS.parquet --cache FOLDER`; "
        f"{machine('wall')}, seed 0.",
        "",
        f"{DOCUMENTS:,} descriptions of packages by all-MiniLM-L6-v2, {TEST:,} summaries as "
        f"queries; the small encoder is its size {SMALL} in its own class, in one Router folder "
        "with it.",
        "",
        f"| encoders | MRR@10 | of the large | NDCG@10 | among {FEW:,} documents: MRR@10 | "
        "of the large |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (all_of, some) in rows.items():
        first = "| | | " if all_of is None else (
            f"| {all_of[0]:.1f} | {100 * all_of[0] / whole[0][0]:.1f} % | {all_of[1]:.1f} "
        )  # fmt: skip
        lines.append(f"| {name} {first}| {some[0]:.1f} | {100 * some[0] / whole[1][0]:.1f} % |")
    lines += [
        "",
        "| a query by | multiply-adds | ms, one at a time |",
        "|---|---:|---:|",
        *(
            f"| the {n} size | {cost[n] / 1e6:.1f} M ({cost[n] / cost['large']:.3f}) | "
            f"{spent[n]:.1f} |"
            for n in cost
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
