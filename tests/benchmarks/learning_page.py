"""docs/results/learning.md and its plots, out of the finished runs of learning.py.

python -m tests.benchmarks.learning_page learning.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from matryoshkafy.report import pictures
from matryoshkafy.report.pictures.svg import svg, tag, text
from tests.benchmarks.learning import METHODS, TASKS, Accuracies, results

RESULTS = Path(__file__).parents[2] / "docs" / "results"
Runs = Mapping[tuple[str, str, int], Accuracies]
DRAWN = ("alone", "masked", "MRL", "sliced, sandwich")
TITLES = {
    "digits": "Handwritten digits: test accuracy, %",
    "text": "Next character of Python's manual: test accuracy, %",
}


def seeds_of(runs: Runs, task: str, method: str) -> list[int]:
    """The seeds that finished."""
    return sorted(seed for t, m, seed in runs if (t, m) == (task, method))


def column(runs: Runs, task: str, method: str, size: int) -> list[float]:
    """The accuracies of a size, seed by seed."""
    return [runs[task, method, seed][size] for seed in seeds_of(runs, task, method)]


def behind(runs: Runs, task: str, method: str, size: int) -> list[float]:
    """Accuracy minus that of the model trained alone, seed by seed."""
    both = set(seeds_of(runs, task, method)) & set(seeds_of(runs, task, "alone"))
    pairs = [(runs[task, method, s][size], runs[task, "alone", s][size]) for s in sorted(both)]
    return [mine - alone for mine, alone in pairs]


def spread(values: Iterable[float], form: str = ".1f") -> str:
    """Mean and standard deviation."""
    found = list(values)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):{form}} ± {deviation:.1f}"


def table(runs: Runs, task: str) -> str:
    """Accuracies, then the differences to the models trained alone."""
    sizes = TASKS[task].sizes
    methods = [m for m in METHODS if seeds_of(runs, task, m)]
    head = "| size | " + " | ".join(str(m) for m in sizes) + " | seeds |"
    rule = "|---|" + "---:|" * (len(sizes) + 1)
    rows = [
        f"| {m} | " + " | ".join(spread(column(runs, task, m, s)) for s in sizes)
        + f" | {len(seeds_of(runs, task, m))} |"
        for m in methods
    ]  # fmt: skip
    apart = [
        f"| {m} | " + " | ".join(spread(behind(runs, task, m, s), "+.1f") for s in sizes) + " | |"
        for m in methods if m != "alone"
    ]  # fmt: skip
    between = "| *minus alone, same seed* |" + " |" * (len(sizes) + 1)
    return "\n".join([head, rule, *rows, between, *apart])


def plot(runs: Runs, task: str) -> str:
    """Size against accuracy, a line a method."""
    sizes = TASKS[task].sizes
    methods = [m for m in DRAWN if seeds_of(runs, task, m)]
    series = {m: {s: statistics.mean(column(runs, task, m, s)) for s in sizes} for m in methods}
    curve = pictures.lines(series, sizes, "accuracy by size")
    place = '<svg x="10" y="30" width="540" height="255" '
    body = curve.replace("<svg ", place, 1) + text(TITLES[task], 20, 20, class_="title")
    body += "".join(key(order, name) for order, name in enumerate(methods))
    return pictures.standalone(svg(body, 560, 320, f"{task}: test accuracy by size and method"))


def key(order: int, name: str) -> str:
    """A line of the legend."""
    x = 24.0 + 134 * order
    style = f"stroke:{pictures.colour(order)}"
    line = tag("line", x1=x, y1=300.0, x2=x + 20, y2=300.0, class_="line", style=style)
    return line + text(name, x + 26, 304.0)


def main() -> None:
    """Write the tables between their marks, and the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    runs = results(parser.parse_args().runs)
    page = RESULTS / "learning.md"
    written = page.read_text()
    for task in sorted({task for task, _, _ in runs}):
        (RESULTS / f"learning-{task}.svg").write_text(plot(runs, task))
        written = between_marks(written, task, table(runs, task))
    page.write_text(written)
    print(json.dumps({m: len(seeds_of(runs, "digits", m)) for m in METHODS}))


def between_marks(page: str, task: str, new: str) -> str:
    """The page with the table of a task replaced."""
    start, end = f"<!-- table: {task} -->", f"<!-- end: {task} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{RESULTS / 'learning.md'} should have a line {start} and then {end}")
    return f"{before}{start}\n\n{new}\n\n{end}{after}"


if __name__ == "__main__":
    main()
