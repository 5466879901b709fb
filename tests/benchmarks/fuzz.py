"""Run the laws on many random models: python -m tests.benchmarks.fuzz --count 50000 --seed 1

Prints how many were checked, how many were refused and why, every counter-example, and the seconds.
Case i of a seed is always the same model, so runs can be cut into pieces with --first.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter

import torch

from matryoshkafy.plan.plan import Options
from tests.fuzz.graphs import build, random_program
from tests.fuzz.laws import check

NESTINGS = (("masked", "block"), ("masked", "prefix"), ("sliced", "block"))


def run_case(seed: int, number: int) -> str:
    """Return what became of one case: kept, a refusal, or the counter-example."""
    source = random.Random(f"{seed}/{number}")
    program, (nesting, norm) = random_program(source), source.choice(NESTINGS)
    try:
        refusal = check(build(program), Options(nesting, "full", norm))
    except Exception as error:  # noqa: BLE001  any error is a counter-example here
        print(f"case {number} {nesting} {norm} {program}: {type(error).__name__}: {error}")
        traceback.print_exc(limit=-3)
        sys.stdout.flush()
        return "BROKEN"
    return "kept" if refusal is None else f"refused, {refusal}"


def main() -> int:
    """Run the cases and print the counts; exit code 1 where a law broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after that long")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, results = time.monotonic(), Counter[str]()
    for number in range(given.first, given.first + given.count):
        results[run_case(given.seed, number)] += 1
        if sum(results.values()) % 500 == 0:
            print(f"{sum(results.values())} cases, {results['BROKEN']} broken", flush=True)
        if time.monotonic() - start > 60 * given.minutes:
            break
    seconds = time.monotonic() - start
    total = sum(results.values())
    print(f"seed {given.seed}, from case {given.first}: {total} cases in {seconds:.0f} s")
    for result, count in results.most_common():
        print(f"{count:8d}  {result}")
    return int("BROKEN" in results)


if __name__ == "__main__":
    raise SystemExit(main())
