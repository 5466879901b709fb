"""MRL's own experiments in miniature (arXiv 2205.13147, figures 2 to 8, tables 26 to 29).

    python -m tests.benchmarks.mrl [--packages DESCRIPTIONS.parquet --cache FOLDER] [--films FOLDER]

Small networks on digits, sections of packages (over MiniLM's vectors) and genres of films (from
posters): a representation of 64 units with a classifier for each size (MRL) or one for all (MRL-E),
logarithmic and uniform ladders, size 8 boosted, sizes that were not trained, a network that was
not nested and is fine-tuned; against networks of one size, truncated SVD and random units of the
full one. Accuracy of the classifier and of the nearest neighbour. Writes docs/results/mrl.md, with
plots.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn

from matryoshkafy.losses import MatryoshkaLoss
from matryoshkafy.losses.heads import MRLEHead, MRLHead
from matryoshkafy.report import pictures
from matryoshkafy.report.pictures.svg import svg, text
from tests.benchmarks.learning_page import key
from tests.benchmarks.small_tasks import Task, digits, films, sections, train, trunk

RESULTS = Path(__file__).parents[2] / "docs" / "results"
WIDTH, STEPS = 64, 400
LOG, UNIFORM = (4, 8, 16, 32, 64), (4, 19, 34, 49, 64)
BETWEEN = (6, 12, 24, 48)
EVERY = tuple(sorted(LOG + BETWEEN))
DRAWN = ("one size each", "MRL", "MRL-E", "SVD of the full network")
Scores = dict[int, float]


@dataclass(frozen=True)
class Result:
    """Test accuracies in percent, by size: of the classifier and of the nearest neighbour."""

    linear: Scores
    nearest: Scores


class Nested(nn.Module):
    """A trunk with a head over several sizes."""

    def __init__(self, task: Task, sizes: Sequence[int], *, shared: bool = False) -> None:
        super().__init__()
        self.trunk = trunk(task.x.shape[1], max(sizes))
        kind = MRLEHead if shared else MRLHead
        self.head = kind(max(sizes), task.classes, sizes)

    def fit(self, task: Task, seed: int, weights: Mapping[int, float] | None = None) -> None:
        """Train all sizes at once."""
        loss = MatryoshkaLoss(nn.CrossEntropyLoss(), weights=dict(weights) if weights else None)
        parameters = list(self.parameters())
        train(parameters, lambda x, y: loss(self.head.outputs(self.trunk(x)), y), task, STEPS,
              seed=seed)  # fmt: skip

    def judged(self, task: Task, between: Sequence[int] = ()) -> Result:
        """Return the accuracies; a classifier between two sizes exists where one is shared."""
        with torch.no_grad():
            hidden = self.trunk(task.x)
            found = {
                size: accuracy(out[task.test], task) for size, out in self.head(hidden).items()
            }
            if isinstance(self.head, MRLEHead):
                for size in between:
                    cut = self.head.weight[:, :size], self.head.bias
                    out = F.linear(hidden[task.test, :size], *cut)
                    found[size] = accuracy(out, task)
        return Result(found, neighbours(hidden, task))


def accuracy(logits: Tensor, task: Task) -> float:
    """Return the share of right answers on the test rows, in percent."""
    return 100 * float((logits.argmax(1) == task.y[task.test]).float().mean())


def neighbours(hidden: Tensor, task: Task) -> Scores:
    """Return the accuracy of the nearest training row, by cosine, at every size."""
    out = {}
    rows = task.train[:4000]
    for size in EVERY:
        if size <= hidden.shape[1]:
            asked, known = (F.normalize(hidden[r, :size], dim=1) for r in (task.test, rows))
            nearest = task.y[rows][(asked @ known.T).argmax(1)]
            out[size] = 100 * float((nearest == task.y[task.test]).float().mean())
    return out


def alone(task: Task, seed: int) -> tuple[Result, nn.Module]:
    """Return networks of one size each, and the largest one's trunk."""
    linear, nearest, last = {}, {}, None
    for size in LOG:
        torch.manual_seed(seed)
        model = Nested(task, (size,))
        model.fit(task, seed)
        found = model.judged(task)
        linear[size], nearest[size], last = found.linear[size], found.nearest[size], model.trunk
    assert last is not None
    return Result(linear, nearest), last


def reduced(task: Task, full: nn.Module, *, random: bool, seed: int) -> Result:
    """Return SVD, or units at random, of a network that was not nested; a classifier refitted."""
    with torch.no_grad():
        hidden = full(task.x)
    if random:
        order = torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(seed))
        turned = hidden[:, order]
    else:
        turned = hidden @ torch.linalg.svd(hidden[task.train], full_matrices=False)[2].T
    linear = {}
    for size in LOG:
        fitted = RidgeClassifier().fit(turned[task.train, :size], task.y[task.train])
        score = fitted.score(turned[task.test, :size], task.y[task.test])
        linear[size] = 100 * float(score)
    return Result(linear, neighbours(turned, task))


def tuned(task: Task, full: nn.Module, seed: int, *, layers: int) -> Result:
    """Return a network that was not nested after fine-tuning its last layers for a quarter."""
    torch.manual_seed(seed)
    model = Nested(task, LOG)
    model.trunk.load_state_dict(full.state_dict())
    linears = [m for m in model.trunk.children() if isinstance(m, nn.Linear)]
    parameters = [
        p for m in (*linears[len(linears) - layers :], model.head) for p in m.parameters()
    ]
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())
    train(parameters, lambda x, y: loss(model.head.outputs(model.trunk(x)), y), task, STEPS // 4,
          seed=seed + 100)  # fmt: skip
    return model.judged(task)


def experiment(task: Task, seed: int) -> dict[str, Result]:
    """Return all methods of one seed."""
    out: dict[str, Result] = {}
    out["one size each"], full = alone(task, seed)
    nested = {
        "MRL": (LOG, False, None),
        "MRL-E": (LOG, True, None),
        "MRL, uniform ladder": (UNIFORM, False, None),
        "MRL-E, uniform ladder": (UNIFORM, True, None),
        "MRL, size 8 weighs 4": (LOG, False, {m: 4.0 if m == 8 else 1.0 for m in LOG}),
    }
    for name, (sizes, shared, weights) in nested.items():
        torch.manual_seed(seed)
        model = Nested(task, sizes, shared=shared)
        model.fit(task, seed, weights)
        out[name] = model.judged(task, EVERY)
    for layers, name in ((1, "last layer"), (3, "all layers")):
        out[f"fine-tuned to MRL, {name}"] = tuned(task, full, seed, layers=layers)
    out["SVD of the full network"] = reduced(task, full, random=False, seed=seed)
    out["random units of the full network"] = reduced(task, full, random=True, seed=seed)
    return out


Runs = list[dict[str, Result]]


def table(runs: Runs, kind: str) -> list[str]:
    """Return accuracies, mean over the seeds with the standard deviation."""
    head = f"| {kind} | " + " | ".join(map(str, EVERY)) + " |"
    lines = [head, "|---|" + "---:|" * len(EVERY)]
    for name in runs[0]:
        cells = []
        for size in EVERY:
            values = [getattr(run[name], kind).get(size) for run in runs]
            known = [v for v in values if v is not None]
            spread = statistics.stdev(known) if len(known) > 1 else 0.0
            cells.append(f"{statistics.mean(known):.1f} ± {spread:.1f}" if known else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(task: Task, runs: Runs) -> str:
    """Return accuracy by size, a line a method."""
    series = {
        name: {s: statistics.mean(run[name].linear[s] for run in runs) for s in LOG}
        for name in DRAWN
    }
    curve = pictures.lines(series, LOG, f"{task.name}: accuracy by size")
    title = f"{task.name}: accuracy of the classifier, %, by size"
    body = curve.replace("<svg ", '<svg x="10" y="30" width="540" height="255" ', 1)
    body += text(title, 20, 20, class_="title")
    body += "".join(key(order, name) for order, name in enumerate(series))
    return pictures.standalone(svg(body, 560, 320, title))


def main() -> None:
    """Train everything, and write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages")
    parser.add_argument("--cache")
    parser.add_argument("--films")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = [digits()]
    if options.packages and options.cache:
        tasks.append(sections(options.packages, options.cache))
    if options.films:
        tasks.append(films(options.films))
    started, lines = time.process_time(), []
    for task in tasks:
        runs = [experiment(task, seed) for seed in range(options.seeds)]
        (RESULTS / f"mrl-{task.name}.svg").write_text(plot(task, runs), encoding="utf-8")
        lines += ["", f"## {task.name.capitalize()}", "",
                  f"{len(task.x):,} rows, {task.classes} classes.", "",
                  f"![accuracy by size](mrl-{task.name}.svg)", "", *table(runs, "linear"), "",
                  *table(runs, "nearest")]  # fmt: skip
        print("\n".join(lines), flush=True)
    spent = time.process_time() - started
    (RESULTS / "mrl.md").write_text("\n".join([*head(options.seeds, spent), *lines, ""]))


def head(seeds: int, spent: float) -> list[str]:
    """Return what stands above the tables."""
    return [
        "# MRL's experiments in miniature",
        "",
        "`python -m tests.benchmarks.mrl --packages DESCRIPTIONS.parquet --cache FOLDER --films "
        f"FOLDER`; {spent:.0f} CPU seconds, seeds 0 to {seeds - 1}.",
        "",
        "After [Matryoshka Representation Learning](https://arxiv.org/abs/2205.13147), figures 2 "
        "to 8 and tables 26 to 29: test accuracy in percent, mean and standard deviation over the "
        "seeds, of the classifier (*linear*) and of the nearest training row by cosine "
        "(*nearest*). "
        f"Networks of three layers, a representation of {WIDTH} units, {STEPS} steps each. The "
        f"logarithmic ladder is {', '.join(map(str, LOG))}, the uniform one "
        f"{', '.join(map(str, UNIFORM))}; {', '.join(map(str, BETWEEN))} were trained by neither: "
        "what a prefix between two trained sizes is worth. *Random units* and *SVD* take the full "
        "network that was trained alone; fine-tuning takes it too, for a quarter of the steps.",
    ]


if __name__ == "__main__":
    main()
