"""A step of distillation at four sizes, one size per row, against a step at full size alone.

    python -m tests.benchmarks.distil_step [--rounds 5] [--batch 64]

all-MiniLM-L6-v2 out of its package, texts of 64 tokens, the teacher's vectors computed before. The
ways alternate in every round; CPU seconds of this process, one thread, the median of the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

import matryoshkafy as mk
from matryoshkafy.training import Recipe, Term
from matryoshkafy.training.distil import Rows, Student, _Run
from tests.benchmarks.distilled import LENGTH, minilm

SIZES = [96, 192, 288, 384]
WAYS = {"full size alone": [384], "four sizes": SIZES}


def main() -> None:
    """Print the seconds of each way, and their ratio."""
    parser = argparse.ArgumentParser(description="a step of distillation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = minilm()
    ids = torch.randint(1000, 20000, (options.batch, LENGTH))
    rows = Rows(list(ids), lambda part: _batch(torch.stack(part)))
    with torch.no_grad():
        lessons = encoder.embedder(**_batch(ids))
    recipe = Recipe(options.rounds, options.batch, terms=(Term("similarity"),))
    runs = {}
    for name, sizes in WAYS.items():
        model = copy.deepcopy(encoder.embedder)
        doll = mk.convert(model, (), _batch(ids[:2]), sizes=sizes, nesting="sliced").eval()
        runs[name] = _Run(Student(doll, lessons), rows, recipe)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(options.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run._step(min(step, options.rounds - 1), torch.arange(options.batch))
            if step:  # the first compiles
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in seconds.items():
        print(f"| {name} | {medians[name]:.2f} | {min(found):.2f} to {max(found):.2f} |")
    one, four = medians.values()
    print(f"four sizes cost {four / one:.2f} of the full size alone")


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


if __name__ == "__main__":
    main()
