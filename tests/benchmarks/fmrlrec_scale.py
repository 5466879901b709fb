"""Preparing more interactions than fit in memory, on one machine or on the workers of Ray.

python -m tests.benchmarks.fmrlrec_scale --interactions 20000000
python -m tests.benchmarks.fmrlrec_scale --interactions 20000000 --workers 2
python -m tests.benchmarks.fmrlrec_scale --interactions 2000000 --plan 571
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from examples.fmrlrec import data, formats
from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.workers import Each, each_on, serially

CHUNK = 1_000_000


def generate(folder: Path, interactions: int) -> Path:
    """Writes parquet parts of interactions between Zipf-distributed users and items."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    users, items = max(10, interactions // 12), max(10, interactions // 100)
    for part, start in enumerate(range(0, interactions, CHUNK)):
        count = min(CHUNK, interactions - start)
        frame = pl.DataFrame(
            {
                "user_id": (users * random.random(count) ** 1.5).astype(np.int64),
                "item_id": (items * random.random(count) ** 3.0).astype(np.int64),
                "timestamp": random.integers(0, 10**9, count),
            }
        )
        frame.write_parquet(folder / f"{part:05}.parquet")
    return folder


def same(one: data.Dataset, other: data.Dataset) -> bool:
    """Whether two prepared data sets are equal, row by row."""
    return (
        np.array_equal(one.items, other.items)
        and np.array_equal(one.offsets, other.offsets)
        and one.user_ids.equals(other.user_ids)
        and one.catalogue.equals(other.catalogue)
    )


def plan(seconds: float, stored: float, dataset: data.Dataset, million: float) -> str:
    """What `million` million interactions would need, from the cost of these by the million."""
    mine = len(dataset.items) / 1e6
    parts = million * 1e6 / Config().partition_rows
    rows = [
        ("read, filter, order (one core)", f"{seconds / 60 * million / mine:,.0f} min"),
        ("the same on 64 cores", f"{seconds / 60 * million / mine / 64:,.1f} min"),
        ("parts of users, one in memory each", f"{parts:,.0f}"),
        ("interactions as parquet", f"{stored / 1024 * million / mine:,.1f} GiB"),
        ("sequences, held whole (4 bytes an interaction)", f"{4 * million * 1e6 / 2**30:,.1f} GiB"),
    ]
    lines = [f"| {what} | {value} |" for what, value in rows]
    return "\n".join([f"| {million:g} million interactions | |", "|---|---|", *lines])


def peak_mb() -> float:
    """The largest resident memory of this process so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(parts: Path, out: Path, config: Config, each: Each) -> tuple[Any, float]:
    """The prepared data and the seconds that they took."""
    source = formats.Source(pl.scan_parquet(parts / "*.parquet"), None, parts)
    started = time.perf_counter()
    found = data.prepare(source, out, config, each)
    return found, time.perf_counter() - started


def main() -> None:
    """Generates, prepares, and prints counts, time and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--partition-rows", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=0, help="prepare with Ray as well")
    parser.add_argument("--plan", type=float, help="millions of interactions to compute for")
    given = parser.parse_args()
    config = replace(Config(), {"partition_rows": given.partition_rows})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = generate(folder / "parts", given.interactions)
        stored = sum(path.stat().st_size for path in parts.iterdir()) / 2**20
        before = peak_mb()
        prepared, seconds = measure(parts, folder / "out", config, serially)
        print(data.statistics(prepared))
        print(f"{given.interactions:,} interactions, {stored:.0f} MB of parquet: {seconds:.0f} s, "
              f"peak {peak_mb():.0f} MB, of which {before:.0f} MB before it began")  # fmt: skip
        if given.workers:
            other, theirs = measure(parts, folder / "ray", config, each_on(given.workers))
            told = "equal" if same(prepared, other) else "UNEQUAL"
            print(f"{given.workers} workers of Ray: {theirs:.0f} s, {told} to one, row by row")
    if given.plan:
        print(plan(seconds, stored, prepared, given.plan))


if __name__ == "__main__":
    main()
