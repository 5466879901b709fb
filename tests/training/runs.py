"""A small run for the tests of training: whole, killed (as a script), or in two processes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.losses import Distillation, MatryoshkaLoss
from matryoshkafy.training import AllSizes, batches, resume_run, save_run

FEATURES, WIDTH, CLASSES, EXAMPLES, BATCH, EPOCHS, SAVE_EVERY = 6, 16, 5, 40, 8, 3, 2
STEPS = EPOCHS * EXAMPLES // BATCH
EVENTS = ("open", "os.", "shutil.")


class Small(nn.Module):
    """Features [N, 6] -> logits [N, 5], with a norm, a residual and dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(FEATURES, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 6] -> [N, 5]."""
        x = self.stem(x)
        x = x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))
        return self.head(x)


def examples() -> tuple[Tensor, Tensor]:
    """Features and classes."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (EXAMPLES,), generator=generator)


def small_doll(seed: int = 0, *, dropout: float = 0.0, **options: Any) -> Doll:
    """A doll with the weights of a seed."""
    torch.manual_seed(seed)
    model = Small(dropout=dropout)
    return mk.convert(model, (torch.randn(3, FEATURES),), sizes="4..16", **options)


def loss_of(**settings: Any) -> MatryoshkaLoss:
    """A cross entropy of every size, and distillation."""
    return MatryoshkaLoss(nn.CrossEntropyLoss(), distill=Distillation(0.5), **settings)


def plain_losses(doll: Doll, steps: int, make: Callable[[Any], Any]) -> list[float]:
    """The losses of a plain loop over consecutive batches."""
    everything, (x, y) = AllSizes(doll, loss_of()), examples()
    optimizer = make(everything.parameters())
    losses = []
    for rows in itertools.islice(consecutive(), steps):
        optimizer.zero_grad()
        loss, _ = everything(x[rows], labels=y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def consecutive() -> Iterator[slice]:
    """The rows of each batch, in order."""
    return (slice(i, i + BATCH) for i in range(0, EXAMPLES, BATCH))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of the comparisons."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def run(folder: Path | None, at_step: Callable[[int], None] = lambda step: None) -> Doll:
    """Train to the end, with everything random that a run can have; resume what `folder` holds."""
    random.seed(3)
    doll, (x, y) = small_doll(dropout=0.2), examples()
    sizes = torch.Generator().manual_seed(5)
    everything = AllSizes(doll, loss_of(n_sizes_per_step=2, generator=sizes))
    optimizer = torch.optim.AdamW(everything.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9], gamma=0.5)
    parts = {"model": doll, "optimizer": optimizer, "scheduler": scheduler, "sizes": sizes}
    saved = resume_run(folder, parts) if folder is not None else None
    step = saved["step"] if saved else 0
    for rows in itertools.islice(order(step), STEPS - step):
        loss, _ = everything(x[rows] + 0.1 * random.random(), labels=y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        step += 1
        at_step(step)
        if folder is not None and step % SAVE_EVERY == 0:
            save_run(folder, parts, {"step": step})
    return doll


def order(step: int) -> Iterator[Tensor]:
    """The batches from a step on."""
    epoch, start = divmod(step, EXAMPLES // BATCH)
    for number in range(epoch, EPOCHS):
        yield from batches(EXAMPLES, BATCH, seed=1, epoch=number, start=start)
        start = 0


class Killed(list[Tensor]):
    """Rows that stop the run when one more than `left` is read, as a kill does."""

    def __init__(self, given: list[Tensor], left: int) -> None:
        super().__init__(given)
        self.left = left

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def killed(folder: str, step: str, event: str) -> None:
    """Train, and be killed: at the n-th event of the first save after a step."""
    count = itertools.count()
    armed: list[bool] = []

    def hook(name: str, _: object) -> None:
        if armed and name.startswith(EVENTS) and next(count) == int(event):
            os.kill(os.getpid(), signal.SIGKILL)

    def at_step(now: int) -> None:
        if now == int(step):
            armed.append(True)

    sys.addaudithook(hook)
    run(Path(folder), at_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed(*sys.argv[1:])
