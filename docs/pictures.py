"""Draws the picture of the README from a real run, and the table of the same numbers.

    python docs/pictures.py            # some minutes on one core; writes docs/images, docs/results

A three-layer network learns scikit-learn's handwritten digits: once as a matryoshka model of six
sizes, and once at each size alone, with the same recipe. Mean test accuracy over the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.losses import MatryoshkaLoss
from matryoshkafy.report import pictures
from matryoshkafy.report.pictures.svg import svg, tag, text
from matryoshkafy.training import scale_rows

SIZES = [8, 16, 32, 64, 128, 256]
SEEDS = range(5)
STEPS, BATCH, RATE = 1500, 256, 2e-3
HERE = Path(__file__).parent
Accuracies = dict[int, list[float]]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels in [0, 1] and classes: 1,297 to train on, 500 to test on, split by one seed."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:-500]], y[order[:-500]], x[order[-500:]], y[order[-500:]]


def network(width: int) -> nn.Module:
    """Return the network of a width."""
    layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Train with the recipe that all models share."""
    x, y, _, _ = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss_of(x[batch], y[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    """Return the share of the test digits that a model names right."""
    _, _, x, y = data()
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def nested(seed: int) -> mk.Doll:
    """Return the model trained once for every size."""
    torch.manual_seed(seed)
    doll = mk.convert(network(SIZES[-1]), (data()[0][:2],), sizes=SIZES)
    scale_rows(doll)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss())
    train(doll, lambda x, y: loss(doll.outputs(x), y))
    return doll


def alone(seed: int, size: int) -> nn.Module:
    """Return a model of one size, trained by itself."""
    torch.manual_seed(seed)
    model = network(size)
    loss = nn.CrossEntropyLoss()
    train(model, lambda x, y: loss(model(x), y))
    return model


def run() -> tuple[Accuracies, Accuracies, mk.Plan]:
    """Return the accuracies of nested and separate models, {size: one a seed}, and the plan."""
    once: Accuracies = {size: [] for size in SIZES}
    apart: Accuracies = {size: [] for size in SIZES}
    for seed in SEEDS:
        doll = nested(seed)
        for size in SIZES:
            once[size].append(accuracy(mk.slice(doll, size)))
            apart[size].append(accuracy(alone(seed, size)))
    return once, apart, doll.plan


def drawn(once: Accuracies, apart: Accuracies, plan: mk.Plan) -> str:
    """Return both halves of the picture side by side."""
    series = {
        "six sizes, trained once": _percent(once),
        "each size trained alone": _percent(apart),
    }
    curve = pictures.lines(series, SIZES, "accuracy by size")
    layer = pictures.weight(plan, "2.weight", side=190)
    body = (
        _placed(layer, 10, 32, "234", "220")
        + _placed(curve, 290, 36, "424", "200")
        + text("One weight, six models", 50, 22, class_="title")
        + text("Test accuracy, % (handwritten digits)", 350, 22, class_="title")
        + "".join(_key(i, name) for i, name in enumerate(series))
    )
    label = "Left: the nested weight. Right: accuracy of each size, trained once and trained alone."
    return pictures.standalone(svg(body, 720, 282, label))


def _placed(drawing: str, x: float, y: float, width: str, height: str) -> str:
    place = f'<svg x="{x:g}" y="{y:g}" width="{width}" height="{height}" '
    return drawing.replace("<svg ", place, 1)


def _key(order: int, name: str) -> str:
    y = 254.0 + 17 * order
    line = tag("line", x1=350.0, y1=y - 4, x2=372.0, y2=y - 4, class_="line",
               style=f"stroke:{pictures.colour(order)}")  # fmt: skip
    return line + text(name, 380.0, y)


def _percent(found: Mapping[int, list[float]]) -> dict[int, float]:
    return {size: 100 * statistics.mean(values) for size, values in found.items()}


def table(once: Accuracies, apart: Accuracies) -> str:
    """Return the numbers as a page of the results."""
    rows = "\n".join(
        f"| {size} | {_spread(once[size])} | {_spread(apart[size])} |" for size in SIZES
    )
    return f"""# Digits: six sizes, trained once

`python docs/pictures.py` draws the picture of the README from this run: a three-layer network
of width 256 on scikit-learn's digits (1,297 to train on, 500 to test on), {STEPS} steps of
{BATCH}, AdamW at {RATE}, masked nesting, the plain sum of the six cross entropies, rows scaled
to the inputs that they read (`scale_rows`). Test accuracy in %, mean and standard deviation over
{len(SEEDS)} seeds; the nested figures are those of the sliced models.

| size | trained once | trained alone |
|---:|---:|---:|
{rows}
"""


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """Run, draw, write."""
    torch.set_num_threads(1)
    once, apart, plan = run()
    for folder in ("images", "results"):
        (HERE / folder).mkdir(exist_ok=True)
    (HERE / "images" / "nested.svg").write_text(drawn(once, apart, plan))
    (HERE / "results" / "digits.md").write_text(table(once, apart))
    print(table(once, apart))


if __name__ == "__main__":
    main()
