"""Random eager models out of the blocks, traced for real and judged from outside in float64.

    python -m tests.fuzz.eager --count 500 --seed 1     # case i of a seed is always the same model
    python -m tests.fuzz.eager write_narrow gradients   # blocks, or kinds of blocks, each alone
    python -m tests.fuzz.eager --count 50000 --seed 1 --ledger cases.jsonl --part 0/2

Prints every case that is wrong or crashes, check by check, and counts. With a ledger a line is
appended for each case, and a later call goes on where the lines end; parts run side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.fuzz import odd as _odd
from tests.fuzz import users as _users
from tests.fuzz.blocks import BLOCKS, KINDS, WIDTH
from tests.zoo.inputs import normal, tokens
from tests.zoo.judge import Verdict, judge
from tests.zoo.registry import Built, Entry, Scale, entry

assert _odd and _users  # importing them registers their blocks
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
    """Draw one to three blocks; every kind of block is as likely as every other.

    Odd ones are judged alone: a case of a seed stays the model that it was.
    """
    kinds = [source.choice(sorted(KINDS.keys() - {"odd"})) for _ in range(source.randint(1, 3))]
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
        for check, outcome in bad_checks(verdict).items():
            print(f"    {check}: {outcome}")
        sys.stdout.flush()


def bad_checks(verdict: Verdict) -> dict[str, str]:
    """Return the checks that say wrong or crash."""
    kinds = ("wrong", "crash")
    return {k: v for k, v in verdict.checks.items() if v.partition(":")[0] in kinds}


class Ledger:
    """A line of JSON for each case that was judged, so that a run can be cut into pieces."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, dict[tuple[int, int], str]()
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        for line in lines:
            row = json.loads(line)
            self.known[row["seed"], row["case"]] = row["status"]

    def note(self, seed: int, number: int, verdict: Verdict) -> None:
        """Append a case; a line is written at once, so that several processes may do so."""
        row = {"seed": seed, "case": number, "nesting": verdict.nesting, "status": verdict.status}
        row |= {"model": verdict.name, "bad": bad_checks(verdict)}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.known[seed, number] = verdict.status

    def counts(self, seed: int) -> Counter[str]:
        """Return how many cases of a seed came out how."""
        return Counter(status for (of, _), status in self.known.items() if of == seed)


def _blocks(names: list[str]) -> Counter[str]:
    """Judge blocks, or kinds of blocks, each alone in both nestings."""
    counts = Counter[str]()
    chosen = [b for k, blocks in KINDS.items() for b in blocks if {k, b} & set(names)]
    for name, nesting in itertools.product(chosen, NESTINGS):
        verdict = alone(name, nesting)
        counts[verdict.status] += 1
        show(verdict, name)
    return counts


def _random(given: argparse.Namespace, ledger: Ledger) -> Counter[str]:
    """Judge the cases of a seed that the ledger has not; return its counts."""
    start = time.monotonic()
    mine, parts = map(int, given.part.split("/"))
    for number in range(given.first, given.first + given.count):
        if number % parts != mine or (given.seed, number) in ledger.known:
            continue
        if time.monotonic() - start > 60 * given.minutes:
            break
        verdict = run_case(given.seed, number)
        ledger.note(given.seed, number, verdict)
        show(verdict, f"case {number}")
    return ledger.counts(given.seed)


def main() -> int:
    """Run the cases and print the counts; exit code 1 where one is wrong or crashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("blocks", nargs="*", help="blocks or kinds to judge alone")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after that long")
    parser.add_argument("--ledger", type=Path, help="a file of lines of JSON, one for each case")
    parser.add_argument("--part", default="0/1", help="i/n: the cases that leave i, divided by n")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    counts = _blocks(given.blocks) if given.blocks else _random(given, Ledger(given.ledger))
    seconds = time.monotonic() - start
    print(f"seed {given.seed}, from {given.first}: {sum(counts.values())} cases, {seconds:.0f} s")
    print(*(f"{count:8d}  {kind}" for kind, count in counts.most_common()), sep="\n")
    return int(counts["wrong"] + counts["crash"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
