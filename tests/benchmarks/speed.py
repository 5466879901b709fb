"""Time and memory of nested layers and losses against what they replace.

    python -m tests.benchmarks.speed                      every row
    python -m tests.benchmarks.speed linear ce-one        rows whose name starts so
    python -m tests.benchmarks.speed --markdown           for docs/

Both sides of a row run in turn, A B A B ..., in one process on one thread; the figure is the median
of the ratios of neighbours, with the quartiles. --clock cpu counts processor time instead of wall
time: use it where other processes share the machine.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import matryoshkafy as mk
import matryoshkafy.kernels.ops  # noqa: F401 - registers the operators
from matryoshkafy.losses import MatryoshkaLoss, nested_cross_entropy
from matryoshkafy.losses.heads import MRLEHead, MRLHead
from tests.kernels import reference

Step = Callable[[], None]
Returned = TypeVar("Returned")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MB = 1e6


@dataclass(frozen=True)
class Pair:
    """Two ways to do one thing.

    figure is "time" (a ratio), or for memory above the gradients of `leaves`: "peak" (of ours, in
    MB) or "memory" (the ratio of the peaks).
    """

    ours: Step
    theirs: Step
    reach: float | None
    figure: str = "time"
    leaves: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Result:
    """What was measured: the figure with its quartiles, and the cost of both sides."""

    name: str
    against: str
    figure: str
    low: str
    high: str
    reach: str
    sides: str


def doubling(width: int, smallest: int = 8) -> list[int]:
    """Runs of the sizes smallest, 2 smallest, ..., width."""
    runs, size = [smallest, 0], smallest
    while size < width:
        runs += [size, runs[-1] + 1]
        size *= 2
    return runs


BERT = [96, 0, 96, 1, 192, 2, 384, 3]


def step_of(module: Callable[[Tensor], Tensor], leaves: list[Tensor], slope: Tensor) -> Step:
    """One forward and backward from fresh gradients."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(leaves[0]).backward(slope)

    return step


def linear(width: int, dtype: torch.dtype, reach: float | None, *, rows: int) -> Pair:
    """Forward and backward of a nested and a dense linear on [rows, width]."""
    runs = BERT if width == 768 else doubling(width)
    dense = nn.Linear(width, width, dtype=dtype)
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    slope, leaves = torch.randn(rows, width).to(dtype), [x, dense.weight, dense.bias]
    nested = partial(
        torch.ops.matryoshkafy.linear,
        weight=dense.weight,
        bias=dense.bias,
        out_runs=runs,
        in_runs=runs,
    )
    return Pair(step_of(nested, leaves, slope), step_of(dense, leaves, slope), reach)


def norm(prefix: bool) -> Pair:
    """Nested against plain LayerNorm on [1024, 768]."""
    x = torch.randn(1024, 768, requires_grad=True)
    plain, slope = nn.LayerNorm(768), torch.randn(1024, 768)
    leaves = [x, plain.weight, plain.bias]

    def nested(x: Tensor) -> Tensor:
        weight = (plain.weight, plain.bias)
        return torch.ops.matryoshkafy.layer_norm(x, *weight, 1e-5, BERT, prefix)

    return Pair(step_of(nested, leaves, slope), step_of(plain, leaves, slope), None)


def convolution(channels: int, side: int, batch: int) -> Pair:
    """Nested against plain 3 x 3 convolution, four sizes."""
    runs = doubling(channels, channels // 8)
    plain = nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(batch, channels, side, side, requires_grad=True)
    leaves, geometry = [x, plain.weight, plain.bias], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def nested(x: Tensor) -> Tensor:
        weight = (plain.weight, plain.bias)
        return torch.ops.matryoshkafy.conv(x, *weight, *geometry, runs, runs)

    slope = torch.randn_like(x)
    return Pair(step_of(nested, leaves, slope), step_of(plain, leaves, slope), None)


CE_SIZES = [8, 16, 32, 64, 128, 256, 512, 1024]


def cross_entropy(against: str, reach: float, figure: str) -> Pair:
    """All 8 sizes, N = 1600, V = 12,101, D = 1024, against one full-size or per-size losses."""
    hidden = torch.randn(1600, 1024, requires_grad=True)
    table = (torch.randn(12_101, 1024) / 32).requires_grad_()
    target = torch.randint(0, 12_101, (1600,))

    def run(loss: Callable[[], Tensor]) -> None:
        hidden.grad = table.grad = None
        loss().backward()

    theirs = {
        "one": lambda: F.cross_entropy(hidden @ table.t(), target),
        "each": lambda: reference.nested_cross_entropy(hidden, table, target, CE_SIZES).sum(),
    }
    ours = partial(nested_cross_entropy, hidden, table, target, CE_SIZES)
    return Pair(partial(run, ours), partial(run, theirs[against]), reach, figure, (hidden, table))


class Encoder(nn.Module):
    """A 6-layer encoder of width 512 with a pooled output, a realistic carrier of a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 512] -> [B, 512]."""
        return self.layers(x).mean(1)


def head(kind: type[MRLHead] | type[MRLEHead]) -> Pair:
    """A whole training step with 8 sizes and 1,000 classes against one linear classifier."""
    trunk, single = Encoder(), nn.Linear(512, 1000)
    nested = kind(512, 1000, [4, 8, 16, 32, 64, 128, 256, 512])
    x, target = torch.randn(16, 64, 512), torch.randint(0, 1000, (16,))
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())

    def step(module: nn.Module, criterion: Callable[[], Tensor]) -> None:
        trunk.zero_grad()
        module.zero_grad()
        criterion().backward()

    ours = partial(step, nested, lambda: loss(nested.outputs(trunk(x)), target))
    theirs = partial(step, single, lambda: F.cross_entropy(single(trunk(x)), target))
    return Pair(ours, theirs, 1.05)


class Classifier(nn.Module):
    """BERT-base (12 layers of width 768) without dropout, mean pooling, 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        chance = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.trunk = BertModel(BertConfig(**chance), add_pooling_layer=False)
        self.head = nn.Linear(768, 1000)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Two [B, T] -> [B, 1000]."""
        return self.head(self.trunk(ids, mask).last_hidden_state.mean(1))


def encoder(figure: str, reach: float) -> Pair:
    """Forward, backward and AdamW of the masked doll, 8 x 128 with padding, against the model.

    Memory is counted without AdamW, whose own temporaries would hide the activations.
    """
    ids, target = torch.randint(0, 30_000, (8, 128)), torch.randint(0, 1000, (8,))
    mask = (torch.arange(128) < torch.randint(64, 129, (8, 1))).long()
    plain = Classifier()
    doll = mk.convert(copy.deepcopy(plain), (ids, mask), sizes="96..768").train()
    nested = MatryoshkaLoss(nn.CrossEntropyLoss())

    def step_on(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)

        def step() -> None:
            loss().backward()
            if figure == "time":
                optimizer.step()
            optimizer.zero_grad()

        return step

    ours = step_on(doll, lambda: nested(doll.outputs(ids, mask), target))
    theirs = step_on(plain.train(), lambda: F.cross_entropy(plain(ids, mask), target))
    return Pair(ours, theirs, reach, figure)


def linear_rows(rows: int) -> dict[str, tuple[str, Callable[[], Pair]]]:
    """The linear at every width and dtype of the table."""
    reach = {
        torch.float32: {256: 0.86, 512: 0.76, 768: None, 1024: 0.72, 2048: 0.72},
        torch.bfloat16: {256: 1.05, 512: 1.05, 768: 1.05, 1024: 0.76, 2048: 0.76},
    }
    return {
        f"linear {str(dtype)[6:]} {width}": (
            f"nn.Linear, {rows} rows",
            partial(linear, width, dtype, limit, rows=rows),
        )
        for dtype, limits in reach.items()
        for width, limit in limits.items()
    }


def table_of_rows(rows: int) -> dict[str, tuple[str, Callable[[], Pair]]]:
    """name -> (what it is measured against, how to build it)."""
    return linear_rows(rows) | {
        "ce-one time": ("one full-size CE", partial(cross_entropy, "one", 1.4, "time")),
        "ce-one peak": ("MB above gradients", partial(cross_entropy, "one", 64.0, "peak")),
        "ce-each time": ("matmul, CE per size", partial(cross_entropy, "each", 0.33, "time")),
        "ce-each memory": ("matmul, CE per size", partial(cross_entropy, "each", 0.06, "memory")),
        "head mrl": ("step with one linear", partial(head, MRLHead)),
        "head mrl-e": ("step with one linear", partial(head, MRLEHead)),
        "step time": ("BERT-base, unconverted", partial(encoder, "time", 0.85)),
        "step memory": ("BERT-base, unconverted", partial(encoder, "memory", 1.0)),
        "norm block": ("nn.LayerNorm 768", partial(norm, False)),
        "norm prefix": ("nn.LayerNorm 768", partial(norm, True)),
        "conv 256": ("nn.Conv2d 3 x 3", partial(convolution, 256, 14, 8)),
        "conv 512": ("nn.Conv2d 3 x 3", partial(convolution, 512, 7, 16)),
    }


def seconds(step: Step, repeats: int, clock: Callable[[], float]) -> float:
    """The time of one step."""
    start = clock()
    for _ in range(repeats):
        step()
    return (clock() - start) / repeats


def alternate(pair: Pair, count: int, clock: Callable[[], float]) -> list[tuple[float, float]]:
    """(ours, theirs) seconds, in turn."""
    for step in (pair.ours, pair.theirs) * 2:
        step()
    repeats = max(1, int(0.02 / max(seconds(pair.theirs, 1, clock), 1e-6)))
    sides = (pair.ours, pair.theirs)
    times = [[seconds(step, repeats, clock) for step in sides] for _ in range(count)]
    return [(ours, theirs) for ours, theirs in times]


def peak_bytes(step: Step, leaves: tuple[Tensor, ...]) -> int:
    """The most memory that a step holds above the leaves' gradients, by the allocator's count."""
    step()
    for leaf in leaves:
        leaf.grad = None
    return most_held(step)[0] - sum(leaf.nbytes for leaf in leaves)


def most_held(work: Callable[[], Returned]) -> tuple[int, Returned]:
    """The most bytes that the CPU allocator holds above the start, and what the work returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most, result


def measure_time(name: str, against: str, pair: Pair, count: int, clock: str) -> Result:
    """The median ratio of times."""
    times = alternate(pair, count, CLOCKS[clock])
    low, middle, high = statistics.quantiles([ours / theirs for ours, theirs in times], n=4)
    ours, theirs = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
    figures = [f"{value:.3f}" for value in (middle, low, high)]
    return Result(name, against, *figures, limit(pair), f"{ours:.2f} / {theirs:.2f} ms")


def measure_memory(name: str, against: str, pair: Pair) -> Result:
    """The peak above the gradients, of ours in MB or as a ratio."""
    ours, theirs = (peak_bytes(step, pair.leaves) / MB for step in (pair.ours, pair.theirs))
    value = ours if pair.figure == "peak" else ours / theirs
    sides = f"{ours:.1f} / {theirs:.1f} MB"
    return Result(name, against, f"{value:.3f}", "", "", limit(pair), sides)


def limit(pair: Pair) -> str:
    """What the row should reach."""
    return "" if pair.reach is None else f"{pair.reach:.2f}"


COLUMNS = ("what", "against", "figure", "q1", "q3", "reach", "ours / theirs")


def cells(result: Result) -> tuple[str, ...]:
    """A row of the table."""
    spread = (result.low, result.high)
    return (result.name, result.against, result.figure, *spread, result.reach, result.sides)


def show(results: list[Result], title: str, *, markdown: bool) -> None:
    """Prints the table."""
    if markdown:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, results)]
        print(f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    table = Table(*COLUMNS, title=title)
    for result in results:
        table.add_row(*cells(result))
    Console(width=120).print(table)


def machine(clock: str, threads: str = "1 thread") -> str:
    """Processor, torch and how busy the machine is."""
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line for line in lines if line.startswith("model name")).split(":")[1]
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    return (
        f"{name.strip()}, {os.cpu_count()} cores, {threads}, torch {torch.__version__}, "
        f"{clock} clock, load {load:.1f}"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help="names (or their beginnings) of rows; all if none")
    parser.add_argument("--alternations", type=int, default=11)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--linear-rows", type=int, default=1024, help="rows of x of the linears")
    return parser.parse_args()


def main() -> None:
    """Measures the chosen rows and prints them."""
    options = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for name, (against, build) in table_of_rows(options.linear_rows).items():
        if options.rows and not name.startswith(tuple(options.rows)):
            continue
        pair = build()
        if pair.figure == "time":
            result = measure_time(name, against, pair, options.alternations, options.clock)
        else:
            result = measure_memory(name, against, pair)
        print(*cells(result), sep="  ", file=sys.stderr, flush=True)
        results.append(result)
    show(results, machine(options.clock), markdown=options.markdown)


if __name__ == "__main__":
    main()
