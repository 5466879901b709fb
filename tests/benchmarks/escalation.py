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
from torch.utils.flop_counter import FlopCounterMode

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


def flops(call: Callable[[], object]) -> float:
    """Return the millions of multiply-adds of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e6


def counted(what: str, more: float, small: float, large: float) -> str:
    """Return a row: what an extension multiplies, against the difference."""
    return (
        f"| {what}: multiply-adds | {more:.1f} M | {large:.1f} - {small:.1f} M | "
        f"{more / (large - small):.3f} |"
    )


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
    session.answer(ids, size=SMALL)
    exact = counted(
        f"encoder, 8 x 48 tokens: extend {SMALL} to {LARGE}",
        flops(lambda: session.extend(LARGE)),
        flops(lambda: small(ids)),
        flops(lambda: large(ids)),
    )
    extend, alone, whole = (statistics.median(t[i] for t in times[2:]) for i in range(3))
    ratios = [t[0] / (t[2] - t[1]) for t in times[2:]]
    return [
        exact,
        f"| encoder, 8 x 48 tokens: extend {SMALL} to {LARGE} | {extend:.1f} ms | "
        f"{whole:.1f} - {alone:.1f} ms | {spread(ratios)} |",
        f"| the same against one pass at {LARGE} | {extend:.1f} ms | {whole:.1f} ms | "
        f"{spread([t[0] / t[2] for t in times[2:]])} |",
    ]


def checked(made: Decoder, ids: torch.Tensor) -> tuple[float, float, float]:
    """Return what checking eight drafted tokens multiplies, and what both sizes do from nothing."""
    small, large = (made._plan.level(size) for size in (SMALL, LARGE))
    start, end = ids.shape[1] - 8, ids[:, -8:]

    def window(levels: tuple[int, int], cached: dict) -> dict:
        return made._window(end, start, levels, cached)[1]

    def prefilled(level: int) -> None:
        made._forget()
        made._window(ids[:, :start], 0, (-1, level), {})

    found = []
    for level in (small, large):
        prefilled(large)
        found.append(flops(lambda level=level: window((-1, level), {})))
    prefilled(large)
    cached = window((-1, small), {})
    return flops(lambda: window((small, large), cached)), found[0], found[1]


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
    drafted = sum(made.cache_bytes(size) for size in (64, 128, 256)) - sum(held.values())
    positions = ids.shape[1] + NEW - 1
    each = sum(held.values()) // positions
    assert drafted <= each, "a draft keeps no more than the positions that it was right about"
    rows = [statistics.median(t[i] for t in times[1:]) / NEW for i in range(2)]
    long = torch.randint(1000, (1, 64))
    return [
        counted(
            f"decoder, 8 tokens after 56: check a draft of {SMALL} at {LARGE}",
            *checked(made, long),
        ),
        f"| decoder, a token at {LARGE} with the cache | {rows[0]:.1f} ms | at {SMALL}: "
        f"{rows[1]:.1f} ms | {spread([t[0] / t[1] for t in times[1:]])} |",
        f"| its cache: bytes that sizes 64, 128, 256 add for {positions} positions | "
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
