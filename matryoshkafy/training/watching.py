"""RunLog: a progress bar and TensorBoard event files, with a line per size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from matryoshkafy.errors import MatryoshkafyError

COLUMNS = (BarColumn, MofNCompleteColumn, TimeRemainingColumn)


class RunLogError(MatryoshkafyError):
    """TensorBoard was asked for and is not installed."""


class RunLog:
    """Shows and records the losses of a run per size; use it in a with statement.

    Args:
        total: steps of the run.
        folder: where event files of TensorBoard go; None for none.
        start: the first step of a resumed run: what TensorBoard holds from there on is dropped.
        every: losses are read, which waits for the device, at each such step.
        console: rich's; None to show nothing where output is no terminal.

    Raises:
        RunLogError: without tensorboard.
    """

    def __init__(
        self,
        total: int,
        *,
        folder: str | os.PathLike[str] | None = None,
        start: int = 0,
        every: int = 10,
        console: Console | None = None,
    ) -> None:
        self.every, self.count = every, start
        self.writer = None if folder is None else event_writer(folder, start)
        columns = [TextColumn("{task.description}"), *[column() for column in COLUMNS]]
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("training", total=total, completed=start)

    def __enter__(self) -> RunLog:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, loss: Tensor | float, per_size: Mapping[int, Tensor | float]) -> None:
        """Count a step, and record `loss` and `loss/<size>` at every n-th."""
        if self.count % self.every == 0:
            total, values = number(loss), {m: number(value) for m, value in per_size.items()}
            self.record("loss", values, self.count)
            self.scalar("loss", total, self.count)
            words = [f"loss {total:.4f}", *[f"{m}: {v:.3f}" for m, v in values.items()]]
            self.bar.update(self.task, description="  ".join(words))
        self.count += 1
        self.bar.update(self.task, completed=self.count)

    def record(self, name: str, values: Mapping[int, Tensor | float], step: int) -> None:
        """Record a metric of every size as `<name>/<size>`."""
        for size, value in values.items():
            self.scalar(f"{name}/{size}", number(value), step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Record one value."""
        if self.writer is not None:
            self.writer.add_scalar(name, value, step)


def number(value: Tensor | float) -> float:
    """A value as Python's float."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def event_writer(folder: str | os.PathLike[str], start: int) -> Any:
    """A writer of event files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunLogError(
            f"event files in {folder} need tensorboard: pip install tensorboard, or folder=None"
        ) from None
    return SummaryWriter(str(folder), purge_step=start or None)
