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

from examples.fmrlrec.config import Config, preset, replace
from examples.fmrlrec.nesting import sizes_of
from examples.fmrlrec.reporting import Curves, Sheet, plot, write_sheet

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
    states, hidden = config.state_factor * width, config.hidden_factor * width
    recurrence = 2 * states * width + 2 * states + 2 * states * width + width + 3 * states
    feed = 3 * hidden * width + 2 * hidden + width
    return config.blocks * (recurrence + feed + 4 * width)


def saving_sheet(config: Config) -> Sheet:
    """Savings by counts of our own blocks, of pure squares, and as published."""
    sizes = tuple(PAPER)
    ours = savings(lambda m: block_parameters(m, config), sizes)
    squares = savings(lambda m: m**2, sizes)
    fitted = savings(lambda m: m**2 + 1.65 * m, sizes)
    rows = tuple(
        (m, round(ours[m], 2), round(squares[m], 2), round(fitted[m], 2), PAPER[m]) for m in sizes
    )
    columns = ("largest size", "our blocks %", "squares %", "m^2 + 1.65 m %", "paper %")
    return Sheet("Parameters saved against training every size alone", columns, rows)


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


def measured_sheet(config: Config, sizes: tuple[int, ...]) -> Sheet:
    """Peak memory of one nested model, of the largest alone, and of every size alone."""
    nested = measure(Probe("nested", sizes, config))
    largest = measure(Probe("alone", sizes[-1:], config))
    every = measure(Probe("alone", sizes, config))
    rows = (
        ("one nested model, all sizes", round(nested, 1), round(100 * (1 - nested / every), 1)),
        ("the largest size alone", round(largest, 1), round(100 * (1 - largest / every), 1)),
        ("every size alone, together", round(every, 1), 0.0),
    )
    shape = f"sizes {sizes[0]}..{sizes[-1]}, batch {config.batch} x {LENGTH}"
    title = f"Peak memory of training, {shape}"
    return Sheet(title, ("what", "MB", "saved %"), rows)


def report_memory(config: Config, folder: Path) -> None:
    """Writes both tables and figure 4."""
    sheet = saving_sheet(config)
    write_sheet(sheet, folder, "memory-counts")
    write_sheet(measured_sheet(config, sizes_of(config)), folder, "memory-measured")
    lines = {
        name: {float(row[0]): row[column] for row in sheet.rows}
        for column, name in ((1, "our blocks"), (4, "paper"))
    }
    plot(Curves("Parameters saved", "%", lines), folder, "memory")


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
            objective(inputs, inputs)[0].backward()
            optimizer.step()
    weights = sum(p.nbytes for objective in objectives for p in objective.parameters())
    sender.send((_peak() - start + weights) / 2**20)
    sender.close()


def _objectives(probe: Probe, features: Any) -> list[Any]:
    from examples.fmrlrec.nesting import NestedObjective, PlainObjective, build, nest

    sizes = ",".join(map(str, probe.sizes))
    config = replace(probe.config, {"sizes": sizes, "modality": "text"})
    if probe.kind == "nested":
        doll = nest(build(config, ITEMS, features, probe.sizes[-1]), config)
        return [NestedObjective(doll, config)]
    return [PlainObjective(build(config, ITEMS, features, size), config) for size in probe.sizes]


def _peak() -> float:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
