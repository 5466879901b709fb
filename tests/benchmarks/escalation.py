"""What it costs to extend an answer, and to check a draft, against what it should.

    python -m tests.benchmarks.escalation

A masked encoder and a masked decoder of four blocks, D = 512, sizes 64, 128, 256, 512, random
weights. Extending 64 -> 256 is timed against the difference of two slices' forwards, and checking a
draft of eight tokens against decoding those eight at the large size, in interleaved rounds on one
thread. Writes docs/results/escalation.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import matryoshkafy as mk
from matryoshkafy.serving import Decoder, Session
from tests.benchmarks.speed import machine
from tests.serving.test_session import Block

PAGE = Path(__file__).parents[2] / "docs" / "results" / "escalation.md"
WIDTH, HEADS, SIZES, SMALL, LARGE, ROUNDS, NEW = 512, 8, "64..512", 64, 256, 15, 24


class Model(torch.nn.Module):
    """Four blocks between a table and logits."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(1000, WIDTH)
        self.place = torch.nn.Embedding(128, WIDTH)
        self.blocks = torch.nn.ModuleList([Block(WIDTH, HEADS, causal) for _ in range(4)])
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 100)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] -> [B, T, 100]"""
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of one call."""
    started = time.perf_counter()
    with torch.no_grad():
        call()
    return (time.perf_counter() - started) * 1000


def encoder() -> list[str]:
    """Return the rows of the encoder."""
    ids = torch.randint(1000, (8, 48))
    doll = mk.convert(Model(causal=False).eval(), (ids,), sizes=SIZES, nesting="masked")
    small, large = mk.slice(doll, SMALL).eval(), mk.slice(doll, LARGE).eval()
    session, times = Session(doll), []
    for _ in range(ROUNDS):
        session.answer(ids, size=SMALL)
        row = [timed(lambda: session.extend(LARGE))]
        row += [timed(lambda: small(ids)), timed(lambda: large(ids))]
        times.append(row)
    extend, alone, whole = (statistics.median(t[i] for t in times[2:]) for i in range(3))
    ratios = [t[0] / (t[2] - t[1]) for t in times[2:]]
    return [
        f"| encoder, 8 x 48 tokens: extend {SMALL} to {LARGE} | {extend:.1f} ms | "
        f"{whole:.1f} - {alone:.1f} ms | {spread(ratios)} |",
        f"| the same against one pass at {LARGE} | {extend:.1f} ms | {whole:.1f} ms | "
        f"{spread([t[0] / t[2] for t in times[2:]])} |",
    ]


def decoder() -> list[str]:
    """Return the rows of the decoder: random weights, so a draft is seldom right."""
    ids = torch.randint(1000, (1, 16))
    doll = mk.convert(Model(causal=True).eval(), (ids,), sizes=SIZES, nesting="masked")
    made, times = Decoder(doll, ids), []
    for _ in range(ROUNDS // 3):
        row = [timed(lambda: made.generate(ids, size=LARGE, new_tokens=NEW))]
        row.append(timed(lambda: made.generate(ids, size=SMALL, new_tokens=NEW)))
        times.append(row)
    alone = made.generate(ids, size=LARGE, new_tokens=NEW)
    held = {size: made.cache_bytes(size) for size in (64, 128, 256)}
    found = made.generate(ids, size=LARGE, draft=SMALL, new_tokens=NEW)
    assert found.tokens == alone.tokens
    rows = [statistics.median(t[i] for t in times[1:]) / NEW for i in range(2)]
    return [
        f"| decoder, a token at {LARGE} with the cache | {rows[0]:.1f} ms | at {SMALL}: "
        f"{rows[1]:.1f} ms | {spread([t[0] / t[1] for t in times[1:]])} |",
        f"| its cache: bytes that sizes 64, 128, 256 add for {ids.shape[1] + NEW - 1} positions | "
        f"{', '.join(f'{n:,}' for n in held.values())} | a draft adds 0 |  |",
    ]


def spread(ratios: list[float]) -> str:
    """Return a median with the least and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Measure, and write the page."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [*encoder(), *decoder()]
    text = "\n".join(
        [
            "# Exact escalation",
            "",
            f"`python -m tests.benchmarks.escalation`; {machine('wall')}. Masked nesting, four "
            f"blocks, D = {WIDTH}, random weights; medians of {ROUNDS} interleaved rounds with the "
            "least and the largest.",
            "",
            "| what | measured | against | ratio |",
            "|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
