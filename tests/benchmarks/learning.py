"""Does it learn? Nested models against models of one size, on tasks that need no download.

    python -m tests.benchmarks.learning digits --seeds 5        the digits of scikit-learn
    python -m tests.benchmarks.learning text --seeds 3          the manual that ships with Python
    python -m tests.benchmarks.learning_page learning.jsonl     docs/results/learning*

Each finished run is a line of the file --out, and is not run again: stop and go on as you like.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.losses import Distillation, MatryoshkaLoss
from matryoshkafy.losses.heads import MRLHead
from matryoshkafy.training import scale_rows

Accuracies = dict[int, float]


@dataclass(frozen=True)
class Data:
    """Batches to train on, drawn by a generator, and one set to test on."""

    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network of a width, its data by seed, the sizes, and the recipe that all runs share."""

    sizes: tuple[int, ...]
    network: Callable[[int], Any]
    data: Callable[[int], Data]
    steps: int
    batch: int
    rate: float = 3e-3
    decay: float = 0.05


@dataclass(frozen=True)
class Method:
    """How sizes are trained. kind: alone, nested (convert), or mrl (heads on a whole trunk)."""

    kind: str
    convert: Mapping[str, str] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = True


class Block(nn.Module):
    """x + FFN(norm(x)), with causal attention before it if asked."""

    def __init__(self, width: int, heads: int = 0) -> None:
        super().__init__()
        self.heads = heads
        if heads:
            self.first = nn.LayerNorm(width)
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
            self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] (with heads: [B, T, width]) -> the same shape."""
        if self.heads:
            x = x + self.attend(self.first(x))
        return x + self.down(torch.relu(self.up(self.norm(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention, [B, T, width]."""
        layers = (self.query, self.key, self.value)
        parts = [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Digits(nn.Module):
    """Pixels [N, 64] -> logits [N, 10] by two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        """The logits, or whatever the head makes."""
        return self.head(self.norm(self.blocks(self.embed(x))))


class Characters(nn.Module):
    """Characters [B, T] -> logits of the next one [B, T, symbols]: a causal transformer."""

    def __init__(self, width: int, symbols: int, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, width // 8) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        self.register_buffer("places", torch.arange(length), persistent=False)

    def forward(self, ids: Tensor) -> Any:
        """The logits, or whatever the head makes."""
        return self.head(self.norm(self.blocks(self.embed(ids) + self.place(self.places))))


def digits_data(seed: int) -> Data:
    """1,297 digits to train on and 500 to test on, split by the seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:-500], order[-500:]

    def draw(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = train[torch.randint(len(train), (count,), generator=generator)]
        return x[chosen], y[chosen]

    return Data(draw, (x[test], y[test]))


LENGTH, ALPHABET = 32, [chr(n) for n in (10, *range(32, 127))]


def text_data(seed: int) -> Data:
    """Windows of the language reference that ships with Python; tested on its last tenth.

    pydoc_data.topics, about 465,000 characters; what is not ASCII reads as a question mark.
    """
    from pydoc_data.topics import topics

    known = {c: i for i, c in enumerate(ALPHABET)}
    whole = "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor([known.get(c, known["?"]) for c in whole])
    cut = len(ids) * 9 // 10

    def draw(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(cut - LENGTH - 1, (count, 1), generator=generator)
        return windows(ids, starts)

    return Data(draw, windows(ids[cut:], torch.arange(0, len(ids) - cut - LENGTH - 1, 64)[:, None]))


def windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """LENGTH characters from each start [B, 1], and the character after each of them."""
    at = starts + torch.arange(LENGTH)
    return ids[at], ids[at + 1]


TASKS = {
    "digits": Task((8, 16, 32, 64, 128, 256), Digits, digits_data, steps=800, batch=128),
    "text": Task(
        (8, 16, 32, 64, 128),
        partial(Characters, symbols=len(ALPHABET), length=LENGTH),
        text_data,
        steps=400,
        batch=32,
    ),
}
SANDWICH = {"n_sizes_per_step": 4, "distill": Distillation(weight=1.0)}
METHODS = {
    "alone": Method("alone"),
    "masked": Method("nested", {"norm": "prefix"}),
    "masked, block norm": Method("nested", {"norm": "block"}),
    "masked, distilled": Method("nested", {"norm": "prefix"}, {"distill": Distillation()}),
    "masked, unscaled": Method("nested", {"norm": "prefix"}, scaled=False),
    "MRL": Method("mrl"),
    "sliced, sandwich": Method("nested", {"nesting": "sliced"}, SANDWICH),
}


def run(task: Task, method: Method, seed: int) -> Accuracies:
    """{size: accuracy in % on the test set} of one method and seed."""
    return KINDS[method.kind](task, method, seed)


def alone(task: Task, method: Method, seed: int) -> Accuracies:
    """Each size is a network of its own."""
    data, found = task.data(seed), {}
    for size in task.sizes:
        torch.manual_seed(seed)
        model = trained(task, data, task.network(size), seed, **method.loss)
        found[size] = accuracy(logits_of(model, data), data)
    return found


def nested(task: Task, method: Method, seed: int) -> Accuracies:
    """One doll; each size is tested as its standalone slice."""
    data = task.data(seed)
    torch.manual_seed(seed)
    model = task.network(task.sizes[-1])
    doll = mk.convert(model, (data.test[0][:2],), sizes=list(task.sizes), **method.convert)
    if method.scaled:
        scale_rows(doll)
    trained(task, data, doll, seed, **method.loss)
    return {size: accuracy(logits_of(mk.slice(doll, size), data), data) for size in task.sizes}


def mrl(task: Task, method: Method, seed: int) -> Accuracies:
    """A head per size over prefixes of the representation of the largest trunk."""
    data = task.data(seed)
    torch.manual_seed(seed)
    model = task.network(task.sizes[-1])
    model.head = MRLHead(model.head.in_features, model.head.out_features, task.sizes)
    trained(task, data, model, seed, **method.loss)
    return {size: accuracy(logits, data) for size, logits in logits_of(model, data).items()}


KINDS = {"alone": alone, "nested": nested, "mrl": mrl}


def trained(task: Task, data: Data, model: Any, seed: int, **settings: Any) -> Any:
    """The model after AdamW with a linear warm-up and a cosine, on batches drawn by the seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(), **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=task.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(shape, steps=task.steps))
    model.train()
    for _ in range(task.steps):
        x, y = data.draw(generator, task.batch)
        optimizer.zero_grad()
        loss(every_size(model, x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def shape(step: int, steps: int) -> float:
    """The share of the learning rate at a step."""
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def every_size(model: Any, x: Tensor) -> Mapping[int, Tensor]:
    """{size: logits}; a model of one size has the size 0."""
    found = model.outputs(x) if isinstance(model, mk.Doll) else model(x)
    return found if isinstance(found, Mapping) else {0: found}


def logits_of(model: Any, data: Data) -> Any:
    """What a model gives on the test set."""
    with torch.no_grad():
        return model.eval()(data.test[0])


def accuracy(logits: Tensor, data: Data) -> float:
    """The share of right answers on the test set in %."""
    right = logits.argmax(-1) == data.test[1]
    return round(100 * int(right.sum()) / right.numel(), 3)


def results(path: Path) -> dict[tuple[str, str, int], Accuracies]:
    """{(task, method, seed): {size: accuracy}} of the runs that are finished."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {
        (r["task"], r["method"], r["seed"]): {int(m): v for m, v in r["accuracy"].items()}
        for r in rows
    }


def main() -> None:
    """Run what is missing, print the table, write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, help="instead of the task's own")
    parser.add_argument("--rate", type=float, help="instead of the task's own; use another --out")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for name in options.methods:
            if (options.task, name, seed) not in results(options.out):
                finish(name, seed, options)


def finish(name: str, seed: int, options: argparse.Namespace) -> None:
    """Run one and append its line."""
    given = {"steps": options.steps, "rate": options.rate}
    task = replace(TASKS[options.task], **{k: v for k, v in given.items() if v is not None})
    found = run(task, METHODS[name], seed)
    line = {"task": options.task, "method": name, "seed": seed, "accuracy": found}
    with options.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
