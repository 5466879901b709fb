"""Cascades on digits and on sections of packages: full accuracy at a part of the cost.

    python -m tests.benchmarks.cascade [--packages DESCRIPTIONS.parquet --cache FOLDER]

Masked dolls of small networks, a fifth of the rows to learn the thresholds on, a fifth to judge on.
In masked nesting a larger size continues a smaller one, so a sample pays the difference; the same
cascade of separate networks pays every size that it passed. Writes docs/results/cascade.md, with a
plot a task.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.losses import MatryoshkaLoss
from matryoshkafy.serving import Cascade, fit_cascade
from matryoshkafy.serving.cascade import disagreement
from matryoshkafy.training import scale_rows
from tests.benchmarks.scatter import scatter
from tests.benchmarks.small_tasks import Task, digits, sections, train

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STEPS, WIDTH = 500, 256
BUDGETS, LOSSES = (0.4, 0.35, 0.3, 0.2, 0.1, 0.05), (0.003, 0.005, 0.01, 0.02, 0.05)
Logits = dict[int, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What a doll says of the rows to choose and to judge on, and what its sizes cost."""

    valid: Logits
    test: Logits
    truth: tuple[np.ndarray, np.ndarray]
    costs: list[float]

    @property
    def full(self) -> float:
        """The largest size's accuracy on the test rows."""
        return right(self.test[max(self.test)], self.truth[1])

    def cascade(
        self, *, loss: float | None = None, budget: float | None = None, shared: bool = True
    ) -> Cascade:
        """Learn a cascade that keeps the largest size's accuracy but for a loss, or a budget."""
        valid, labels = self.valid, self.truth[0]
        floor = None if loss is None else right(valid[max(valid)], labels) - loss
        costs = self.costs
        return fit_cascade(valid, labels, costs=costs, floor=floor, budget=budget, shared=shared)

    def judged(self, cascade: Cascade) -> tuple[float, float]:
        """Return accuracy on the test rows, and the cost of a sample, of the largest size's."""
        routed = cascade.route(self.test)
        return routed.accuracy(self.truth[1]), routed.cost / self.costs[-1]


def right(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right answers."""
    return float((logits.argmax(1) == labels).mean())


def run(task: Task, seed: int) -> Run:
    """Train a doll."""
    torch.manual_seed(seed)
    layers = (
        nn.Linear(task.x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, task.classes),
    )  # fmt: skip
    doll = mk.convert(nn.Sequential(*layers), (task.x[:2],), sizes="8..256", nesting="masked")
    scale_rows(doll)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())
    train(list(doll.parameters()), lambda x, y: loss(doll.outputs(x), y), task, STEPS, seed=seed)
    doll.eval()
    with torch.no_grad():
        logits = {size: out.numpy() for size, out in doll.outputs(task.x).items()}
    costs = [float(sum(p.numel() for p in mk.slice(doll, m).parameters())) for m in doll.sizes]
    valid, test = (rows.numpy() for rows in (task.valid, task.test))
    y = task.y.numpy()
    parts = ({m: v[rows] for m, v in logits.items()} for rows in (valid, test))
    return Run(*parts, (y[valid], y[test]), costs)


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return the expected calibration error in ten bins of confidence (Guo et al. 2017)."""
    scaled = torch.from_numpy(logits / temperature).softmax(1).numpy()
    sure, hits = scaled.max(1), scaled.argmax(1) == labels
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [
        abs(sure[bins == b].mean() - hits[bins == b].mean()) * (bins == b).mean()
        for b in range(10)
        if (bins == b).any()
    ]
    return float(sum(gaps))


def mean(values: list[float], form: str = ".2f", scale: float = 100.0) -> str:
    """Return mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.mean(values):{form}} ± {scale * spread:{form}}"


def sizes_table(runs: list[Run]) -> list[str]:
    """Return each size alone, and how sure it is of itself."""
    lines = ["| size | cost | accuracy | right where the largest is wrong | calibration error | "
             "after its temperature |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    cascades = [r.cascade(budget=0.5) for r in runs]
    apart = [disagreement(r.test, r.truth[1]) for r in runs]
    for level, size in enumerate(runs[0].test):
        pairs = list(zip(runs, cascades, strict=True))
        before = [calibration(r.test[size], r.truth[1], 1.0) for r in runs]
        after = [calibration(r.test[size], r.truth[1], c.temperatures[level]) for r, c in pairs]
        cells = [
            f"{runs[0].costs[level] / runs[0].costs[-1]:.3f}",
            mean([right(r.test[size], r.truth[1]) for r in runs]),
            mean([a[size] for a in apart]) if size in apart[0] else "",
            mean(before),
            mean(after),
        ]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return lines


def cascades_table(runs: list[Run]) -> list[str]:
    """Return the cascades: accuracy against the largest size's, and cost."""
    lines = ["| cascade | accuracy | minus the largest size, points | cost | cost of separate "
             "networks |", "|---|---:|---:|---:|---:|"]  # fmt: skip
    named: list[tuple[str, Callable[[Run, bool], Cascade]]] = [
        ("best accuracy, size by size (MRL)", lambda r, s: r.cascade(shared=s)),
        *(
            (f"budget: {budget:g} of the cost",
             lambda r, s, budget=budget: r.cascade(budget=budget, shared=s))
            for budget in BUDGETS
        ),
        *(
            (f"floor: largest size - {100 * loss:g} points",
             lambda r, s, loss=loss: r.cascade(loss=loss, shared=s))
            for loss in LOSSES
        ),
    ]  # fmt: skip
    for name, learn in named:
        found = [r.judged(learn(r, True)) for r in runs]
        apart = [r.judged(learn(r, False))[1] for r in runs]
        cells = [
            mean([a for a, _ in found]),
            mean([a - r.full for (a, _), r in zip(found, runs, strict=True)], "+.2f"),
            mean([c for _, c in found], ".3f", 1.0),
            mean(apart, ".3f", 1.0),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(task: Task, runs: list[Run]) -> str:
    """Return accuracy against mean cost: every single size, and the cascades."""
    first = runs[0]
    share = [c / first.costs[-1] for c in first.costs]
    alone = [
        (share[i], 100 * statistics.mean(right(r.test[m], r.truth[1]) for r in runs))
        for i, m in enumerate(first.test)
    ]
    staged = []
    for budget in BUDGETS:
        found = [r.judged(r.cascade(budget=budget)) for r in runs]
        accuracy, cost = (statistics.mean(f[i] for f in found) for i in (0, 1))
        staged.append((cost, 100 * accuracy))
    costs = "cost of a sample (largest size: 1)"
    series = {"one size": alone, "cascade": staged}
    return scatter(series, costs, f"{task.name.capitalize()}: accuracy, %")


def main() -> None:
    """Train, route, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages")
    parser.add_argument("--cache")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.first, options.first + options.seeds)
    tasks = [digits()]
    if options.packages and options.cache:
        tasks.append(sections(options.packages, options.cache))
    lines = [
        "# Cascades",
        "",
        "`python -m tests.benchmarks.cascade --packages DESCRIPTIONS.parquet --cache FOLDER`; "
        f"seeds {seeds[0]} to {seeds[-1]}. How budgets and floors are kept was settled on "
        "seeds 0 to 4.",
        "",
        f"Masked dolls of three linears, {WIDTH} wide, sizes 8 to {WIDTH}, {STEPS} steps. A fifth "
        "of the rows to learn temperatures and thresholds on, a fifth to judge on. Cost: "
        "parameters that a sample is multiplied with, the largest size is 1; a masked doll pays "
        "the difference from size to size, separate networks pay each (with a floor or a budget of "
        "their own). Mean and standard deviation over the seeds, percent.",
    ]
    for task in tasks:
        runs = [run(task, seed) for seed in seeds]
        (RESULTS / f"cascade-{task.name}.svg").write_text(plot(task, runs), encoding="utf-8")
        lines += ["", f"## {task.name.capitalize()}", "",
                  f"{len(task.x):,} rows, {task.classes} classes, {len(task.test):,} to judge on.",
                  "", f"![accuracy against cost](cascade-{task.name}.svg)", "",
                  *cascades_table(runs), "", *sizes_table(runs)]  # fmt: skip
    (RESULTS / "cascade.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
