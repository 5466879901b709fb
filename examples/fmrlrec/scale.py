"""Preparing more interactions than fit in memory: time and peak memory on a generated file.

python -m examples.fmrlrec.scale --interactions 20000000
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from examples.fmrlrec import data, formats
from examples.fmrlrec.config import Config, replace

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


def peak_mb() -> float:
    """The largest resident memory of this process so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    """Generates, prepares, and prints counts, time and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--partition-rows", type=int, default=2_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = generate(folder / "parts", given.interactions)
        source = formats.Source(pl.scan_parquet(parts / "*.parquet"), None, folder)
        config = replace(Config(), {"partition_rows": given.partition_rows})
        before, started = peak_mb(), time.perf_counter()
        prepared = data.prepare(source, folder / "out", config)
        seconds = time.perf_counter() - started
        stored = sum(path.stat().st_size for path in parts.iterdir()) / 2**20
    print(data.statistics(prepared))
    print(f"{given.interactions:,} interactions, {stored:.0f} MB of parquet: {seconds:.0f} s, "
          f"peak {peak_mb():.0f} MB, of which {before:.0f} MB before it began")  # fmt: skip


if __name__ == "__main__":
    main()
