"""What one nested model saves against every size alone: section 4 and figure 4 of fMRLRec.

    python -m tests.benchmarks.fmrlrec_memory --sizes 8..1024 --out tables

Counting: a plain model of width m has N(m) = a m^2 + b m + c parameters. The sizes below D need no
weights of their own in a nested model, so that training all sizes alone costs sum N(m) / N(D) - 1
more than the largest alone. The published savings 0, 25.16, 31.39, 32.90, 33.25 % for ladders 128
to 128..2048 are this figure for b / a = 1.65; pure squares give 0, 25, 31.25, 32.81, 33.20 %.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from examples.fmrlrec.config import Config, preset, replace
from examples.fmrlrec.model import HIDDEN, STATES
from examples.fmrlrec.nesting import sizes_of
from examples.fmrlrec.reporting import plot, write_table

PAPER = {128: 0.0, 256: 25.16, 512: 31.39, 1024: 32.90, 2048: 33.25}
ITEMS, FEATURES, LENGTH = 2000, 256, 50


@dataclass(frozen=True)
class Probe:
    """A training to measure: nested or each size alone, over these sizes."""

    kind: str
    sizes: tuple[int, ...]
    config: Config


def savings(count: Callable[[int], float], sizes: Sequence[int]) -> dict[int, float]:
    """Saving in percent for each ladder that starts at the first size and ends at a later one."""
    return {
        last: 100 * sum(count(size) for size in sizes[:rung]) / count(last)
        for rung, last in enumerate(sizes)
    }


def block_parameters(width: int, config: Config) -> int:
    """Parameters of the plain blocks of one width: what grows with the square of the width."""
    states, hidden = STATES * width, HIDDEN * width
    recurrence = 2 * states * width + 2 * states + 2 * states * width + width + 3 * states
    feed = 3 * hidden * width + 2 * hidden + width
    return config.blocks * (recurrence + feed + 4 * width)


def saving_table(config: Config) -> pl.DataFrame:
    """Savings by counts of our own blocks, of pure squares, and as published."""
    sizes = tuple(PAPER)
    counts = {
        "our blocks %": lambda m: block_parameters(m, config),
        "squares %": lambda m: m**2,
        "m^2 + 1.65 m %": lambda m: m**2 + 1.65 * m,
    }
    columns = {name: [*savings(count, sizes).values()] for name, count in counts.items()}
    table = pl.DataFrame({"largest size": sizes, **columns, "paper %": [*PAPER.values()]})
    return table.with_columns(pl.col(pl.Float64).round(2))


def measure(probe: Probe) -> float:
    """Peak memory in MB of three training steps, above that of the imports; runs a process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_here, args=(probe, sender))
    child.start()
    sender.close()
    found = receiver.recv()
    child.join()
    return found


def measured_table(config: Config, sizes: tuple[int, ...]) -> pl.DataFrame:
    """Peak memory of one nested model, of the largest alone, and of every size alone."""
    found = {
        "one nested model, all sizes": measure(Probe("nested", sizes, config)),
        "the largest size alone": measure(Probe("alone", sizes[-1:], config)),
        "every size alone, together": measure(Probe("alone", sizes, config)),
    }
    every = found["every size alone, together"]
    saved = [round(100 * (1 - peak / every), 1) for peak in found.values()]
    peaks = [round(peak, 1) for peak in found.values()]
    return pl.DataFrame({"what": [*found], "MB": peaks, "saved %": saved})


def report_memory(config: Config, folder: Path) -> None:
    """Writes both tables and figure 4."""
    table, sizes = saving_table(config), sizes_of(config)
    write_table(table, "Parameters saved against training every size alone",
                folder / "memory-counts")  # fmt: skip
    shape = f"sizes {sizes[0]}..{sizes[-1]}, batch {config.batch} x {LENGTH}"
    write_table(measured_table(config, sizes), f"Peak memory of training, {shape}",
                folder / "memory-measured")  # fmt: skip
    lines = {
        name: dict(zip(table["largest size"], table[f"{name} %"], strict=True))
        for name in ("our blocks", "paper")
    }
    plot("Parameters saved, %", lines, folder / "memory")


def main() -> None:
    """Measures with the settings of the paper."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="8..1024")
    parser.add_argument("--out", type=Path, default=Path("tables"))
    given = parser.parse_args()
    report_memory(replace(preset("paper"), {"sizes": given.sizes}), given.out)


def _measure_here(probe: Probe, sender: Any) -> None:
    import torch

    from examples.fmrlrec.encoders import Features

    random = np.random.default_rng(0)
    features = Features({"text": random.normal(size=(ITEMS + 1, FEATURES)).astype(np.float32)})
    inputs = torch.from_numpy(random.integers(1, ITEMS, (probe.config.batch, LENGTH)))
    objectives = _objectives(probe, features)
    start = _peak()
    optimizers = [torch.optim.AdamW(objective.parameters()) for objective in objectives]
    for _ in range(3):
        for objective, optimizer in zip(objectives, optimizers, strict=True):
            optimizer.zero_grad()
            objective(inputs, labels=inputs)[0].backward()
            optimizer.step()
    weights = sum(p.nbytes for objective in objectives for p in objective.parameters())
    sender.send((_peak() - start + weights) / 2**20)
    sender.close()


def _objectives(probe: Probe, features: Any) -> list[Any]:
    from examples.fmrlrec.nesting import build, nest, objective

    sizes = ",".join(map(str, probe.sizes))
    config = replace(probe.config, {"sizes": sizes, "modality": "text"})
    if probe.kind == "nested":
        doll = nest(build(config, ITEMS, features, probe.sizes[-1]), config)
        return [objective(doll, config)]
    return [_alone(build(config, ITEMS, features, size)) for size in probe.sizes]


def _alone(model: Any) -> Any:
    """A plain model that returns its loss, as the nested one does."""
    from torch.nn.functional import cross_entropy

    plain = model.forward
    model.forward = lambda inputs, labels: [
        cross_entropy(plain(inputs).flatten(0, 1), labels.flatten())
    ]
    return model


def _peak() -> float:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
