"""One training step of a nested recommender against the unconverted one, over all items.

    python -m tests.benchmarks.recommender_step sasrec lrurec --rounds 5

Both compute the cross entropy over 12,101 items and its gradients, on one thread; seconds are CPU
time, so that other work on the machine counts for less, and rounds alternate. "all" has a target at
each of 50 positions, "short" at the last nine, as a shop's mean history: the unconverted model
scores the padding, too, and the nested loss does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import examples.fmrlrec.nesting  # noqa: F401  how axes cross the example's own operator
import matryoshkafy as mk
from tests.benchmarks.recommender_models import RECIPES, small

ITEMS, LENGTH, WIDTH, SIZES = 12_101, 50, 64, "8..64"


def batch(count: int, real: int) -> tuple[Tensor, Tensor]:
    """Histories that end at the last position, and what comes next; 0 pads."""
    random = torch.Generator().manual_seed(0)
    items = torch.randint(1, ITEMS, (count, LENGTH + 1), generator=random)
    items[:, : LENGTH - real] = 0
    return items[:, :-1], items[:, 1:] * (items[:, :-1] != 0)


def plain_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Scores of every position, then the cross entropy of those that count."""
    real, scores = targets != 0, model(inputs)
    if not bool(real.all()):
        scores, targets = scores[real], targets[real]
    F.cross_entropy(scores.flatten(0, -2), targets.flatten()).backward()


def nested_step(doll: mk.Doll, loss: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The cross entropies of all sizes."""
    loss(doll.outputs(inputs), targets).backward()


def seconds(call: Callable[[], None], model: nn.Module) -> float:
    """CPU time of a step."""
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    call()
    return time.process_time() - started


def compare(name: str, nesting: str, real: int, given: argparse.Namespace) -> None:
    """Prints the medians of both, and the ratio."""
    recipe = RECIPES[name]
    model = small(recipe.build(ITEMS + recipe.tokens, WIDTH, LENGTH), recipe.dropout, 0).train()
    example = torch.ones(3, LENGTH, dtype=torch.int64)
    norm = "prefix" if nesting == "masked" else "block"
    doll = mk.convert(model, (example,), sizes=SIZES, nesting=nesting, norm=norm).train()
    loss = mk.MatryoshkaLoss(nn.CrossEntropyLoss(ignore_index=0))
    inputs, targets = batch(given.batch, real)
    plain, nested = [], []
    for _ in range(given.rounds + 1):
        plain.append(seconds(lambda: plain_step(model, inputs, targets), model))
        nested.append(seconds(lambda: nested_step(doll, loss, inputs, targets), doll))
    one, all_ = statistics.median(plain[1:]), statistics.median(nested[1:])
    kind = "all" if real == LENGTH else "short"
    print(f"{name:9} {nesting:7} {kind:6} unconverted {one:6.2f} s, every size {all_:6.2f} s, "
          f"ratio {all_ / one:.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Compares each named model in both nestings, with and without padding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=RECIPES)
    parser.add_argument("--nesting", nargs="+", default=["masked", "sliced"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.names:
        for nesting in given.nesting:
            for real in (LENGTH, 9):
                compare(name, nesting, real, given)


if __name__ == "__main__":
    main()
