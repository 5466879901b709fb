"""Three classification tasks for small networks: digits, sections of packages, genres of films."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """Inputs [N, features], labels [N], and which rows are for training, choosing, judging."""

    name: str
    x: Tensor
    y: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.y.max()) + 1


def task_of(name: str, x: Tensor, y: Tensor) -> Task:
    """Split with seed 0: 60 % to train on, 20 % to choose on, 20 % to judge on."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second = int(0.6 * len(x)), int(0.8 * len(x))
    mean, spread = x[order[:first]].mean(0), x[order[:first]].std() + 1e-6
    parts = order[:first], order[first:second], order[second:]
    return Task(name, (x - mean) / spread, y, *parts)


def digits() -> Task:
    """1,797 digits of 8 x 8 pixels (scikit-learn)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return task_of("digits", torch.tensor(found.data).float(), torch.tensor(found.target))


def sections(data: str, cache: str) -> Task:
    """Descriptions of packages, as MiniLM's vectors, of the 20 largest sections."""
    from tests.benchmarks.package_vectors import encoded, encoder_of, rows_of

    rows = rows_of(data)
    table = encoded(encoder_of(), rows["description"].to_list(), Path(cache), "description")
    names = rows["section"].value_counts(sort=True)["section"].to_list()[:20]
    label = {name: i for i, name in enumerate(sorted(names))}
    labels = np.array([label.get(name, -1) for name in rows["section"].to_list()])
    kept = labels >= 0
    values = torch.from_numpy(table.values[kept])
    return task_of("sections", values, torch.from_numpy(labels[kept]))


def films(folder: str) -> Task:
    """Posters of films, 16 x 16 pixels, and the first of their genres.

    The folder holds items.csv (image, categories split by a bar) and images/.
    """
    import polars as pl
    from PIL import Image

    rows = pl.read_csv(Path(folder) / "items.csv").drop_nulls(["image", "categories"])
    pixels, genres = [], []
    for image, categories in zip(rows["image"], rows["categories"], strict=True):
        path = Path(folder) / "images" / Path(image).name
        if path.is_file():
            small = Image.open(path).convert("RGB").resize((16, 16))
            pixels.append(np.asarray(small, dtype=np.float32).ravel() / 255)
            genres.append(categories.split("|")[0])
    label = {name: i for i, name in enumerate(sorted(set(genres)))}
    y = torch.tensor([label[name] for name in genres])
    return task_of("films", torch.from_numpy(np.stack(pixels)), y)


def trunk(features: int, width: int, hidden: int = 128) -> nn.Module:
    """A network of three layers: features -> representation [width]."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, width),
    )  # fmt: skip


Loss = Callable[[Tensor, Tensor], Tensor]


def train(
    parameters: list[nn.Parameter], loss_of: Loss, task: Task, steps: int, *, seed: int
) -> None:
    """Train with AdamW on random batches of 128; the rate falls to zero along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = task.train[torch.randint(len(task.train), (128,), generator=generator)]
        optimizer.zero_grad()
        loss_of(task.x[rows], task.y[rows]).backward()
        optimizer.step()
        schedule.step()
