"""Time of converting, propagating and solving, and the memory of slicing.

    python -m tests.benchmarks.core

Converting runs in turn with torch.export of the same model, A B A B ...: once with the batch and
the length dynamic, as converting asks for them, and once with fixed shapes. The figure is the
median of the ratios of neighbours, with the quartiles, by wall clock: with as many threads as torch
takes by itself, and with one. Propagation and solving are seconds on a
model of the meta device. Slicing counts the bytes that torch's CPU allocator holds at most above
the doll.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.graph.trace import trace
from matryoshkafy.plan.freeze import Request
from matryoshkafy.plan.plan import Options
from matryoshkafy.plan.solve import solve
from matryoshkafy.plan.walk import propagate
from tests.benchmarks.speed import machine, most_held

BERT_SIZES, LLAMA_SIZES = "96..768", "512..4096"


def bert(device: str = "cpu") -> tuple[nn.Module, torch.Tensor]:
    """BERT-base with random weights, and ids [2, 16]."""
    from transformers import BertConfig, BertModel

    with torch.device(device):
        return BertModel(BertConfig()).eval(), torch.ones(2, 16, dtype=torch.long)


def llama() -> tuple[nn.Module, torch.Tensor]:
    """LLaMA-7B on the meta device, and ids [2, 16]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(use_cache=False)).eval()
        return model, torch.ones(2, 16, dtype=torch.long)


def export(model: nn.Module, ids: torch.Tensor, dynamic: bool) -> None:
    """torch.export alone."""
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    shapes = {"input_ids": axes} if dynamic else None
    with torch.no_grad():
        torch.export.export(model, (ids,), strict=False, dynamic_shapes=shapes)


def seconds(work: Callable[[], object]) -> float:
    """The time of one call, with nothing left to collect from before."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def convert_rows(count: int, threads: int) -> None:
    """Converting BERT-base against torch.export."""
    torch.set_num_threads(threads)
    model, ids = bert()
    ours = partial(mk.convert, model, (ids,), sizes=BERT_SIZES)
    for dynamic, reach in ((True, "1.80"), (False, "")):
        theirs = partial(export, model, ids, dynamic)
        ours(), theirs()
        times = [(seconds(ours), seconds(theirs)) for _ in range(count)]
        mine, other = (statistics.median(side) for side in zip(*times, strict=True))
        against = f"torch.export, {'dynamic' if dynamic else 'fixed'} batch and length"
        ratio = spread([a / b for a, b in times])
        name = f"convert BERT-base, {threads} thread{'s' if threads > 1 else ''}"
        row(name, against, ratio, reach, f"{mine:.2f} / {other:.2f} s")


def solving_rows(count: int) -> None:
    """Propagation and solving on the meta device."""
    rows = (
        ("BERT-base", bert("meta"), BERT_SIZES, "0.10 s"),
        ("LLaMA-7B", llama(), LLAMA_SIZES, "0.25 s"),
    )
    for name, (model, ids), sizes, reach in rows:
        traced = trace(model, (ids,))

        def both(traced=traced, sizes=sizes) -> None:
            solve(traced, propagate(traced), Request(Options(), sizes))

        both()
        times = [seconds(both) for _ in range(count)]
        nodes = f"{len(traced.graph.nodes)} nodes"
        row("propagate and solve", f"{name}, meta, {nodes}", f"{spread(times)} s", reach, "")


def slicing_rows() -> None:
    """The most memory that `slice` holds above the doll, against the sub-model's bytes."""
    model, ids = bert()
    doll = mk.convert(model, (ids,), sizes=BERT_SIZES)
    for size in doll.sizes:
        peak, held = peak_of(partial(mk.slice, doll, size))
        sides = f"{peak / 1e6:.0f} / {held / 1e6:.0f} MB"
        row(f"slice {size}", "the sub-model's bytes", f"{peak / held:.3f}", "1.20", sides)


def peak_of(work: Callable[[], nn.Module]) -> tuple[int, int]:
    """The most bytes held while working, and the bytes of the resulting module's state."""
    gc.collect()
    most, module = most_held(work)
    return most, sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def row(*cells: str) -> None:
    """Prints a row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--alternations", type=int, default=11)
    count = parser.parse_args().alternations
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"{machine('wall', 'threads as named')}\n")
    row("what", "against", "figure", "reach", "ours / theirs")
    row(*["---"] * 5)
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        convert_rows(count, threads)
    solving_rows(count)
    slicing_rows()


if __name__ == "__main__":
    main()
