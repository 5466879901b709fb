"""One small encoder for queries: documents by MiniLM, queries by a size of it.

    python -m tests.benchmarks.unequal descriptions.parquet --cache FOLDER [--doll DOLL]

The query encoder is nested in MiniLM: 288 of its 384 units and 192 of the 1,536 in every feed
forward, a quarter of the multiply-adds, and still a stock BERT (9 heads of 32). It begins with the
weights of DOLL, which `distilled.py` made of MiniLM, or with MiniLM's own units in order. A linear
map into MiniLM's space is fitted once; behind it the encoder learns (and the full size, at every
fifth step), on the summaries of packages
that are not held out (a fifth is, by a hash of the package's name, as in `distilled.py`), how
MiniLM's own query spreads over their descriptions, half and half with the description that the
summary is of. Documents keep MiniLM's vectors. A killed run goes on with the same command. Both
encoders are written as one Router folder, which is then measured. Writes docs/results/unequal.md.
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
import torch.nn.functional as F
from matryoshkafy_cli.family_texts import Texts as Family
from matryoshkafy_cli.text_encoders import TextEncoder, load_encoder
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.serving import Vectors, exact, fit_projection, save_router
from matryoshkafy.serving.metrics import ndcg_of, reciprocal_rank_of
from matryoshkafy.training import Recipe, Term, distil
from tests.benchmarks.distilled import at, embedded
from tests.benchmarks.package_vectors import LENGTH, encoded, encoder_of, minilm_folder, rows_of
from tests.benchmarks.speed import machine

PAGE = Path(__file__).parents[2] / "docs" / "results" / "unequal.md"
SMALL, HIDDEN, DOCUMENTS, TEST, K, FEW, ROUNDS = 288, 192, 20_000, 2_000, 10, 4_000, 5
CALIBRATION, FITTED, STEPS, SHARPNESS, OWN = 256, 4_000, 1_500, 20.0, 0.5


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


@dataclass(frozen=True)
class Query:
    """The small encoder: the doll that holds it, and its map into MiniLM's space [288, 384]."""

    doll: Doll
    encoder: TextEncoder
    projection: Tensor


def started(texts: Texts, cache: Path, start: Path | None) -> Query:
    """Return the small encoder as it begins."""
    encoder, learned = load_encoder(minilm_folder(), LENGTH), texts.summaries[texts.held :]
    example = encoder.batch(learned[:2])
    width = encoder.embedder.model.config.hidden_size
    if start is not None:
        encoder.embedder.load_state_dict(mk.load(start).state_dict())
    plan = mk.inspect(encoder.embedder, (), example, sizes=[SMALL, width], nesting="sliced")
    hidden = {g.name: [HIDDEN, g.size] for g in plan.groups if "intermediate" in g.name}
    doll = mk.convert(
        encoder.embedder, (), example, sizes=[SMALL, width], nesting="sliced", overrides=hidden
    ).eval()
    if start is None:
        few = [encoder.batch(learned[i : i + 32]) for i in range(0, CALIBRATION, 32)]
        mk.order(doll, few, by="contribution")
    file = cache / "projection.safetensors"
    if not file.is_file():
        small = embedded(at(doll, SMALL), encoder, learned[:FITTED])
        large = texts.queries.values[texts.held :][:FITTED]
        save_file({"matrix": fit_projection(small.numpy(), large)}, file)
    return Query(doll, encoder, torch.from_numpy(load_file(file)["matrix"]))


def retrieving(texts: Texts, projection: Tensor) -> tuple[Term, Tensor]:
    """Return what is learnt, and the lessons: MiniLM's query, then the row of its own document."""
    rows = slice(texts.held, None)
    queries, documents = (
        F.normalize(torch.from_numpy(part.values[rows]), dim=-1)
        for part in (texts.queries, texts.documents)
    )
    width = queries.shape[1]

    def of(output: Any, _: object) -> Tensor:
        found = output if isinstance(output, Tensor) else output[0]
        found = found if found.shape[1] == width else found @ projection
        return SHARPNESS * F.normalize(found.float(), dim=-1) @ documents.t()

    def of_teacher(lesson: Tensor, _: object) -> Tensor:
        wanted = (1 - OWN) * (SHARPNESS * lesson[:, :width] @ documents.t()).softmax(-1)
        wanted[torch.arange(len(wanted)), lesson[:, width].long()] += OWN
        return wanted.log()

    own = torch.arange(len(queries))[:, None].float()
    return Term("kl", of=of, of_teacher=of_teacher), torch.cat([queries, own], dim=1)


def distilled(texts: Texts, cache: Path, start: Path | None, steps: int) -> Path:
    """Return the Router folder, with the small encoder trained where it is not there yet."""
    place = cache / f"query-{SMALL}-{HIDDEN}-{steps}"
    if (place / "router" / "modules.json").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    query = started(texts, place, start)
    term, lessons = retrieving(texts, query.projection)
    learned, batch = texts.summaries[texts.held :], query.encoder.batch
    width = max(query.doll.sizes)
    recipe = Recipe(
        steps, 64, 3e-4, terms=(term,), sizes="one", weights={SMALL: 0.8, width: 0.2}, save=100
    )
    ids = query.encoder.tokenizer(learned, truncation=True, max_length=LENGTH)["input_ids"]
    print(
        distil(
            query.doll,
            lessons,
            learned,
            recipe,
            collate=batch,
            lengths=[len(row) for row in ids],
            folder=place / "run",
        )
    )
    mk.save(query.doll, place / "doll", force=True)
    folder = place / "small"
    if not (folder / "config.json").is_file():
        Family(query.encoder, ["a text"], ["another"]).write(
            query.doll, mk.slice(query.doll, SMALL), folder
        )
    projection = query.projection.numpy()
    save_router(place / "router", query=folder, document=minilm_folder(), projection=projection)
    return place


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
    parser.add_argument("--doll", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cache = Path(options.cache)
    texts = read(options.data, cache)
    place = distilled(texts, cache, options.doll, options.steps)
    PAGE.write_text(page(texts, place, options.steps), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def page(texts: Texts, place: Path, steps: int) -> str:
    """Measure, and return the page."""
    query = place / "small"
    router, small = encoder_of(str(place / "router")), encoder_of(str(query))
    asked = texts.summaries[:TEST]
    by_router = router.encode_query(asked, show_progress_bar=False)
    by_small = small.encode(asked, show_progress_bar=False)
    documents = texts.documents.values[:DOCUMENTS]
    few = small.encode(texts.descriptions[:FEW], show_progress_bar=False)
    large, doll = texts.queries.values[:TEST], mk.load(place / "doll")
    assert isinstance(doll, Doll)
    encoder = load_encoder(minilm_folder(), LENGTH)
    by_full = embedded(at(doll, max(doll.sizes)), encoder, asked).numpy()
    rows = {
        "both by MiniLM": (scores(large, documents), scores(large, documents[:FEW])),
        "queries by the small size, documents by MiniLM": (
            scores(by_router, documents), scores(by_router, documents[:FEW]),
        ),
        "queries by the doll's full size, documents by MiniLM": (
            scores(by_full, documents), scores(by_full, documents[:FEW]),
        ),
        "both by the small size": (None, scores(by_small, few)),
    }  # fmt: skip
    encoders = {
        "small": load_encoder(query, LENGTH),
        "large": encoder,
    }
    cost = {name: flops(e, asked[:200]) for name, e in encoders.items()}
    spent = milliseconds({"small": router, "large": encoder_of()}, asked[:100])
    whole = rows["both by MiniLM"]
    lines = [
        "# One small encoder for queries",
        "",
        "`python -m tests.benchmarks.unequal DESCRIPTIONS.parquet --cache FOLDER --doll DOLL`; "
        f"{machine('wall')}, seed 0, {steps:,} steps of 64 summaries.",
        "",
        f"{DOCUMENTS:,} descriptions of packages by all-MiniLM-L6-v2, {TEST:,} summaries as "
        f"queries, all held out. The small encoder is nested in MiniLM ({SMALL} units, {HIDDEN} in "
        "every feed forward), of MiniLM's class, and lies in one Router folder with it. Both sizes "
        "of the doll learnt on the other packages' summaries, from MiniLM's own vectors and from "
        "whose description a summary is; MiniLM itself learnt nothing of these pairs.",
        "",
        f"| encoders | MRR@10 | of MiniLM | NDCG@10 | among {FEW:,} documents: MRR@10 | "
        "of MiniLM |",
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
