"""Random eager models out of the blocks, traced for real and judged from outside in float64.

    python -m tests.fuzz.eager --count 500 --seed 1     # case i of a seed is always the same model
    python -m tests.fuzz.eager write_narrow gradients   # blocks, or kinds of blocks, each alone

Prints every case that is wrong or crashes, check by check, and counts.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tests.fuzz.blocks import BLOCKS, KINDS, WIDTH
from tests.zoo.inputs import normal, tokens
from tests.zoo.judge import Verdict, judge
from tests.zoo.registry import Built, Entry, Scale, entry

STARTS = ("ids", "vectors")
HEADS = ("classes", "items", "pooled", "pair")
NESTINGS = ("sliced", "masked")


@dataclass(frozen=True)
class Recipe:
    """What a model is made of."""

    start: str
    blocks: tuple[str, ...]
    head: str

    def __str__(self) -> str:
        return f"{self.start} > {' > '.join(self.blocks)} > {self.head}"


class Model(nn.Module):
    """A start, blocks, a head."""

    def __init__(self, recipe: Recipe, s: Scale) -> None:
        super().__init__()
        self.recipe = recipe
        ids = recipe.start == "ids"
        self.embed = nn.Embedding(97, s(WIDTH)) if ids else nn.Linear(9, s(WIDTH))
        self.blocks = nn.ModuleList(BLOCKS[name](s) for name in recipe.blocks)
        self.out = nn.Linear(s(WIDTH), 5)

    def forward(self, given: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.embed(given)
        for block in self.blocks:
            x = block(x)
        if self.recipe.head == "items" and self.recipe.start == "ids":
            return x[:, -1] @ self.embed.weight.T
        if self.recipe.head == "pooled":
            return self.out(x.mean(1))
        return (self.out(x), self.out(x[:, 0])) if self.recipe.head == "pair" else self.out(x)


def entry_of(recipe: Recipe) -> Entry:
    """Return the recipe as an entry: a model in float64, and the same class at a smaller width."""
    table: dict[str, Entry] = {}

    @entry(str(recipe), "fuzz", table=table)
    def make(s: Scale) -> Built:
        given = tokens() if recipe.start == "ids" else normal(3, 7, 9).double()
        return Model(recipe, s).double(), (given,), {}

    return table[str(recipe)]


def random_recipe(source: random.Random) -> Recipe:
    """Draw one to three blocks; every kind of block is as likely as every other."""
    kinds = [source.choice(sorted(KINDS)) for _ in range(source.randint(1, 3))]
    blocks = tuple(source.choice(KINDS[kind]) for kind in kinds)
    return Recipe(source.choice(STARTS), blocks, source.choice(HEADS))


def recipe_of(seed: int, number: int) -> tuple[Recipe, str]:
    """Return one case of a seed: a recipe and a nesting."""
    source = random.Random(f"{seed}/{number}")
    return random_recipe(source), source.choice(NESTINGS)


def run_case(seed: int, number: int) -> Verdict:
    """Judge one case of a seed."""
    recipe, nesting = recipe_of(seed, number)
    return judge(entry_of(recipe), nesting)


def alone(name: str, nesting: str) -> Verdict:
    """Judge one block before a feed-forward net."""
    return judge(entry_of(Recipe("ids", (name, "FeedForward"), "classes")), nesting)


def show(verdict: Verdict, label: str) -> None:
    """Print a case that is wrong or crashes, and which checks say so."""
    if verdict.status in ("wrong", "crash"):
        print(f"{label} {verdict.nesting} {verdict.status}: {verdict.name}")
        for check, outcome in verdict.checks.items():
            if outcome.partition(":")[0] in ("wrong", "crash"):
                print(f"    {check}: {outcome}")
        sys.stdout.flush()


def _cases(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    chosen = [b for k, names in KINDS.items() for b in names if {k, b} & set(given.blocks)]
    for name, nesting in itertools.product(chosen, NESTINGS):
        yield name, partial(alone, name, nesting)
    for number in range(given.first, given.first + given.count) if not given.blocks else ():
        yield f"case {number}", partial(run_case, given.seed, number)


def main() -> int:
    """Run the cases and print the counts; exit code 1 where one is wrong or crashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("blocks", nargs="*", help="blocks or kinds to judge alone")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after that long")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, counts = time.monotonic(), Counter[str]()
    for label, case in _cases(given):
        verdict = case()
        counts[verdict.status] += 1
        show(verdict, label)
        if time.monotonic() - start > 60 * given.minutes:
            break
    seconds = time.monotonic() - start
    print(f"seed {given.seed}, from {given.first}: {sum(counts.values())} cases, {seconds:.0f} s")
    print(*(f"{count:8d}  {kind}" for kind, count in counts.most_common()), sep="\n")
    return int(counts["wrong"] + counts["crash"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
