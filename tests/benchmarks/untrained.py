"""MiniLM cut without training: by start, and what a refit of each slice adds.

    python -m tests.benchmarks.untrained [--what all] [--starts ordered,turned] [--sizes 96,192]

`--what stream` narrows the residual stream alone, `all` the heads and hidden layers with it;
`output` cuts the returned vector alone, as it is and turned by a matrix behind it.
Starts: `as it is`, `ordered`, `turned` (`post_norm="diagonal"`), `dense` (gains as matrices, turned
exactly). `--alone` makes a start for each size by itself. Cuts: the plain slice, with a factor per
norm, gains and biases refitted, all weights refitted. Agreement with the full model on 600
sentences of `pydoc_data.topics`: Spearman of all pairwise cosines / share of the ten nearest
neighbours; 400 others calibrate. One thread; only the draw of the sentences is random (seed 0).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matryoshkafy_cli.families import agreement
from matryoshkafy_cli.text_encoders import TextEncoder
from torch import Tensor

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.units.dense_gains import dense_gains
from matryoshkafy.units.norm_scales import norm_scales
from matryoshkafy.units.report import OrderReport
from matryoshkafy.units.rotate import RotateReport
from tests.benchmarks.distilled import embedded, minilm
from tests.benchmarks.pretrained import _sentences

TEST, CALIBRATION, WIDTH = 600, 400, 384
CUTS = ("slice", "factors", "vectors", "weights")


@dataclass(frozen=True)
class Start:
    """A doll to cut, the one whose values a slice should have, and the way from there to here."""

    doll: Doll
    full: Doll
    report: OrderReport | RotateReport | None


class Behind(torch.nn.Module):
    """The encoder, and a matrix that writes its vector."""

    def __init__(self, embedder: torch.nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self.dense = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        torch.nn.init.eye_(self.dense.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.dense(self.embedder(input_ids=input_ids, attention_mask=attention_mask))


@dataclass(frozen=True)
class Bench:
    """An encoder, the sentences, and the full model's vectors of those to agree on."""

    encoder: TextEncoder
    sentences: list[str]
    batches: Sequence[Mapping[str, Tensor]]
    truth: Tensor

    def agreement(self, model: object) -> str:
        found = embedded(model, self.encoder, self.sentences)
        return "{:.3f} / {:.3f}".format(*agreement(found, self.truth))

    def doll(self, what: str, sizes: list[int], *, dense: bool) -> Doll:
        model = copy.deepcopy(self.encoder.embedder)
        example = self.batches[0]
        if dense:
            dense_gains(model)
        whole: dict[str, list[int]] = {}
        if what == "stream":
            plan = mk.inspect(model, (), example, sizes=sizes, nesting="sliced")
            rest = (g for g in plan.groups if g.size != WIDTH)
            whole = {g.name: [g.size] * len(sizes) for g in rest}
        ladder = {"sizes": sizes, "nesting": "sliced", "overrides": whole, "check": False}
        return mk.convert(model, (), example, **ladder).eval()  # type: ignore[arg-type]

    def start(self, name: str, what: str, sizes: list[int]) -> Start:
        doll = self.doll(what, sizes, dense=name == "dense")
        full = copy.deepcopy(doll)
        if name == "ordered":
            return Start(doll, full, mk.order(doll, self.batches, by="contribution"))
        if name == "turned":
            report = mk.rotate(doll, self.batches, by="contribution", post_norm="diagonal")
            return Start(doll, full, report)
        if name == "dense":
            mk.rotate(doll, self.batches, by="contribution")
        return Start(doll, doll, None)

    def output_rows(self, sizes: Sequence[int]) -> list[str]:
        """Return a row for each size of the vector: its first units, and its first directions."""
        model, batch = Behind(copy.deepcopy(self.encoder.embedder)), self.batches[0]
        doll = mk.convert(model, (), batch, sizes=sorted({*sizes, WIDTH}), scope="output").eval()
        mk.rotate(doll, self.batches, unread="leave")
        turned = embedded(doll, self.encoder, self.sentences)
        return [
            f"| {size} | "
            + " | ".join(
                "{:.3f} / {:.3f}".format(*agreement(v[:, :size], self.truth))
                for v in (self.truth, turned)
            )
            + " |"
            for size in sizes
        ]

    def cells(self, start: Start, size: int, kinds: list[str]) -> str:
        """Return a cell for each way to cut a size."""
        return " | ".join(self.agreement(self.cut(start, size, kind)) for kind in kinds)

    def cut(self, start: Start, size: int, kind: str) -> torch.nn.Module:
        small = mk.slice(start.doll, size)
        if kind == "factors":
            norm_scales(start.doll, self.batches).fold(small, size)
        elif kind in ("vectors", "weights"):
            weights = kind == "weights"
            mk.refit(small, start.full, self.batches, start.report, weights=weights)
        return small


def bench() -> Bench:
    """Return the encoder, its sentences and its vectors."""
    encoder, drawn = minilm(None), _sentences()
    test, rest = drawn[:TEST], drawn[TEST : TEST + CALIBRATION]
    batches = [encoder.batch(rest[i : i + 50]) for i in range(0, CALIBRATION, 50)]
    return Bench(encoder, test, batches, embedded(encoder.embedder, encoder, test))


def main() -> None:
    """Print the rows of the table as they come."""
    parser = argparse.ArgumentParser(description="MiniLM cut without training")
    parser.add_argument("--what", choices=("stream", "all", "output"), default="all")
    parser.add_argument("--starts", default="as it is,ordered,turned")
    parser.add_argument("--sizes", default="96,192,288,384")
    parser.add_argument("--measured", default="", help="sizes of the ladder to measure; all")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--cuts", default=",".join(CUTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, kinds, own = list(map(int, options.sizes.split(","))), options.cuts.split(","), bench()
    if options.what == "output":
        print("| size | first units | turned |", "|---|---|---|", *own.output_rows(sizes), sep="\n")
        return
    wanted = list(map(int, options.measured.split(","))) if options.measured else sizes
    print(f"| start | size | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 2)}")
    for name in options.starts.split(","):
        ladders = [[s, WIDTH] for s in sizes] if options.alone else [sizes]
        for ladder in ladders:
            began = time.process_time()
            start = own.start(name, options.what, sorted({*ladder, WIDTH}))
            print(f"{name}: {time.process_time() - began:.0f} CPU seconds", file=sys.stderr)
            for size in ladder[:1] if options.alone else wanted:
                print(f"| {name} | {size} | {own.cells(start, size, kinds)} |", flush=True)


if __name__ == "__main__":
    main()
