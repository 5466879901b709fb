"""What stands beside MiniLM's distilled sizes: its vector cut short, and what each size costs.

    python -m tests.benchmarks.beside_distilled cut DESCRIPTIONS.parquet OUT --packages 20000
    python -m tests.benchmarks.beside_distilled costs DESCRIPTIONS.parquet OUT --packages 20000

`cut`: MRR@10 and the section of the nearest other description, of the full model's vector cut to
its first units, and to its first directions (of the training texts; `rotate` finds the same).
`costs`: parameters, operations of a text of 64 tokens, and texts a second of each native size, one
thread, rounds in turn, the median. OUT holds the teacher's vectors, as for `distilled`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from matryoshkafy_cli.text_encoders import Embedder, TextEncoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import matryoshkafy as mk
from matryoshkafy.units.bases import principal
from tests.benchmarks.distilled import (
    LENGTH,
    embedded,
    minilm,
    read,
    reciprocal_rank,
    same_section,
    taught,
)

SIZES, CUTS, ROUNDS, TEXTS = (96, 192, 288, 384), (24, 48, 96, 192, 288), 5, 512


def cut(encoder: TextEncoder, options: argparse.Namespace) -> None:
    """Print a row for each length of the vector."""
    parts = read(options.descriptions, options.packages, options.documents)
    train, test = (taught(options.out, encoder, name, parts[name]) for name in ("train", "test"))
    moment = train.vectors().double()
    basis = principal(moment.t() @ moment).float()
    full = _quality(test.queries, test.documents, test.sections)
    print("| units | first units | first directions |\n|---|---|---|")
    for size in CUTS:
        cells = [
            _share(_quality(a[:, :size], b[:, :size], test.sections), full)
            for a, b in (
                (test.queries, test.documents),
                (test.queries @ basis.t(), test.documents @ basis.t()),
            )
        ]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


def _quality(queries: Tensor, documents: Tensor, sections: list[str]) -> tuple[float, float]:
    return reciprocal_rank(queries, documents), same_section(documents, sections)


def _share(found: tuple[float, float], full: tuple[float, float]) -> str:
    return "{:.1f} / {:.1f}".format(*(100 * a / b for a, b in zip(found, full, strict=True)))


def costs(encoder: TextEncoder, options: argparse.Namespace) -> None:
    """Print a row for each native size."""
    texts = read(options.descriptions, options.packages, TEXTS)["test"][1]
    models = {size: _native(encoder, size) for size in SIZES}
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size, model in models.items():
            start = time.perf_counter()
            embedded(model, encoder, texts)
            seconds[size].append(time.perf_counter() - start)
    full = statistics.median(seconds[SIZES[-1]])
    print("| size | parameters | operations | texts a second | of the full model |")
    print("|---|---|---|---|---|")
    for size, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        rates = sorted(len(texts) / s for s in seconds[size])
        rate = f"{statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
        faster = full / statistics.median(seconds[size])
        cells = (size, f"{count:,}", f"{_operations(model, encoder) / 1e9:.2f} G", rate)
        print(f"| {' | '.join(map(str, cells))} | {faster:.1f} x |", flush=True)


def _native(encoder: TextEncoder, size: int) -> nn.Module:
    """Return the class at a size, with its pooling; what it costs does not hang on its weights."""
    own, example = encoder.embedder, encoder.batch(["one text", "another text"])
    doll = mk.convert(own.model, (), example, sizes=list(SIZES), nesting="sliced").eval()
    model = mk.native(mk.slice(doll, size), like=encoder.builder)
    return Embedder(model, own.pooling, normalised=own.normalised).eval()


def _operations(model: nn.Module, encoder: TextEncoder) -> int:
    """Return the multiplications and additions of one text of LENGTH tokens."""
    batch = encoder.batch(["word " * (2 * LENGTH)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops()


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description="Beside MiniLM's distilled sizes")
    parser.add_argument("what", choices=("cut", "costs"))
    parser.add_argument("descriptions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=int, default=6000)
    parser.add_argument("--documents", type=int, default=5000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    {"cut": cut, "costs": costs}[options.what](minilm(None), options)


if __name__ == "__main__":
    main()
