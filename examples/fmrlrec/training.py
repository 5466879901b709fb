"""The training loop: one objective for plain and nested models, resumable at any step.

Batches are a function of (seed, epoch), the learning rate of the step, and everything else that a
run has accumulated is in a folder of `matryoshkafy.training` that replaces its predecessor whole.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.fmrlrec.config import Config, DataError, RunError
from examples.fmrlrec.data import PADDING, Dataset, Steps, training_batches, training_windows
from examples.fmrlrec.evaluation import Scorer, Table, evaluate
from matryoshkafy.files.folders import whole_file
from matryoshkafy.training import RunLog, resume_run, save_run

STATE, BEST = "state", "best.safetensors"
LAST_RATE = 0.02  # of the learning rate is left at the end of a cosine
SCALES_FACTOR = 10
COLUMNS = 8  # sizes that fit a line of 80 characters


class Objective(Protocol):
    """A module whose call gives the loss of a batch, and which scores for evaluation."""

    @property
    def model(self) -> Any:
        """The plain model or the doll."""
        ...

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...

    def start_step(self, epoch: int, step: int) -> None:
        """Told before each step; both are counted from 0."""

    def scorer(self) -> Scorer:
        """Scores every size at the last position."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the next batch, the sums of this epoch, the best epoch, the history.

    `losses` are the sums of the batches so far and `counts` how many of them had each.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = -1
    history: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Session:
    """What the steps of a run share."""

    objective: Any
    optimizer: Any
    accelerator: Accelerator
    data: Dataset
    config: Config
    folder: Path
    log: RunLog
    windows: np.ndarray
    batches: int


def train(objective: Objective, data: Dataset, config: Config, folder: Path) -> Progress:
    """Trains until `config.epochs` or `config.patience`, and leaves the best weights in place.

    A run that was killed goes on from its last checkpoint in `folder`: bit for bit on a CPU, if on
    as many threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    session, progress = _open(objective, data, config, folder)
    with session.log as log:
        while not finished(progress, config):
            progress = _epoch(session, progress)
            for line in log_lines(progress):
                log.bar.console.print(line, highlight=False, markup=False)
    load_weights(objective.model, folder / BEST)
    return progress


def finished(progress: Progress, config: Config) -> bool:
    """Whether the epochs are used up or `patience` epochs brought nothing better."""
    stale = progress.epoch - 1 - progress.best_epoch
    return progress.epoch >= config.epochs or (progress.epoch > 0 and stale >= config.patience)


def log_lines(progress: Progress) -> list[str]:
    """The last epoch as a row of a table of at most 80 columns, under a head at the first one.

    NDCG@10 of each size; of more than eight the largest ones. A star marks the best epoch so far.
    """
    last = progress.history[-1]
    found = {name.split()[1]: v for name, v in last.items() if name.startswith("NDCG@10 ")}
    shown = list(found)[-COLUMNS:]
    head = "epoch  time     loss" + "".join(f"{size:>7}" for size in shown)
    star = " *" if progress.best_epoch == progress.epoch - 1 else ""
    row = f"{progress.epoch:5}{_clock(last['seconds']):>6}{last['loss']:9.3f}"
    row += "".join(f"{found[size]:7.4f}" for size in shown) + star
    above = ["validation NDCG@10 by size, a line an epoch, * the best so far", head]
    return [*above, row] if len(progress.history) == 1 else [row]


def _clock(seconds: float) -> str:
    """3.2s, 54s, 12m, 3.4h: five characters at most."""
    value, unit = seconds, "s"
    for longer in "mh":
        if value >= 100:
            value, unit = value / 60, longer
    return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"


def parameter_groups(objective: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and the recurrence's eigenvalues do not.

    `factor` multiplies the learning rate: scales of scores travel further than weights.
    """
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    trained = [p for n, p in named if n.startswith("model.")]
    scales = [p for n, p in named if not n.startswith("model.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": decay, "factor": 1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "factor": 1},
        {"params": scales, "weight_decay": 0.0, "factor": SCALES_FACTOR},
    ]
    return groups if scales else groups[:2]


def mixed_precision(config: Config) -> str:
    """What accelerate calls the precision of a run."""
    half = config.precision == "bf16" or (config.precision == "auto" and torch.cuda.is_available())
    return "bf16" if half else "no"


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the weights of `path` into `model`."""
    if not path.exists():
        raise RunError(f"no {path.name} in {path.parent}; run `train` first")
    model.load_state_dict(load_file(path))


def _open(objective: Any, data: Dataset, config: Config, folder: Path) -> tuple[Session, Progress]:
    accelerator = Accelerator(mixed_precision=mixed_precision(config))
    optimizer = torch.optim.AdamW(parameter_groups(objective, config.weight_decay), lr=config.lr)
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    parts = {"objective": objective, "optimizer": optimizer}
    position = resume_run(folder / STATE, parts)
    if position is None:
        torch.manual_seed(config.seed)
    progress = Progress(**(position or {}))
    windows = training_windows(data, config)
    if not len(windows):
        raise DataError("no user has the four items that one training step needs")
    batches = -(-len(windows) // config.batch)
    is_main = accelerator.is_main_process
    log = RunLog(
        config.epochs * batches,
        folder=folder / "tensorboard" if is_main else None,
        start=progress.step,
        every=1,
        console=None if is_main else Console(quiet=True),
    )
    shared = (prepared, optimizer, accelerator, data, config, folder, log, windows, batches)
    return Session(*shared), progress


def _epoch(session: Session, progress: Progress) -> Progress:
    config, started = session.config, time.monotonic() - progress.seconds
    session.objective.train()
    batches = training_batches(session.data, session.windows, config, epoch=progress.epoch)
    for batch in islice(batches, progress.batch, None):
        progress = _step(session, progress, batch)
        if config.checkpoint_steps and progress.step % config.checkpoint_steps == 0:
            _save(session, dataclasses.replace(progress, seconds=time.monotonic() - started))
    progress = dataclasses.replace(progress, seconds=time.monotonic() - started)
    return _close_epoch(session, progress)


def _step(session: Session, progress: Progress, batch: Steps) -> Progress:
    inputs, targets, share = _share(session.accelerator, batch)
    for group in session.optimizer.param_groups:
        rate = learning_rate(progress.step, session.batches, session.config)
        group["lr"] = rate * group["factor"]
    _own(session).start_step(progress.epoch, progress.step)
    loss, losses = session.objective(inputs, targets)
    _check_loss(loss, progress)
    session.optimizer.zero_grad()
    # Processes average their gradients: weighted by their targets, the sum is that of one process.
    session.accelerator.backward(loss if share == 1 else loss * share)
    session.accelerator.clip_grad_norm_(session.objective.parameters(), session.config.clip)
    session.optimizer.step()
    values = {name: _mean(session.accelerator, value, share)
              for name, value in {"loss": loss, **losses}.items()}  # fmt: skip
    session.log.step(values["loss"], {int(n[5:]): v for n, v in values.items() if n != "loss"})
    sums, counts = dict(progress.losses), dict(progress.counts)
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value
        counts[name] = counts.get(name, 0) + 1
    return dataclasses.replace(
        progress, batch=progress.batch + 1, step=progress.step + 1, losses=sums, counts=counts
    )


def learning_rate(step: int, batches: int, config: Config) -> float:
    """Rises over `warmup` steps; then stays, or falls as a cosine until the last of `epochs`."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return rate
    share = min(1.0, step / (batches * config.epochs))
    return rate * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2)


def _share(accelerator: Accelerator, batch: Steps) -> tuple[Tensor, Tensor, float]:
    """The rows of a batch that belong to this process, and what its mean loss counts for.

    The mean over all targets is the mean over the processes of share times their own means.
    """
    world, row = accelerator.num_processes, accelerator.process_index
    mine = slice(row, None, world) if row < len(batch.inputs) else slice(0, 1)
    arrays = batch.inputs[mine], batch.targets[mine]
    inputs, targets = (torch.from_numpy(a).to(accelerator.device) for a in arrays)
    if world == 1:
        return inputs, targets, 1.0
    counted = (arrays[1] != PADDING).sum() if row < len(batch.inputs) else 0
    return inputs, targets, float(counted * world / (batch.targets != PADDING).sum())


def _mean(accelerator: Accelerator, value: Tensor, share: float) -> float:
    """A loss over the targets of all processes."""
    if accelerator.num_processes == 1:
        return float(value.detach())
    return float(accelerator.reduce(value.detach() * share, "mean"))


def _check_loss(loss: Tensor, progress: Progress) -> None:
    if not torch.isfinite(loss):
        raise RunError(
            f"the loss is {loss.item()} at step {progress.step} (epoch {progress.epoch + 1}); "
            "lower --set lr=... or --set clip=... and start in a new folder"
        )


def _close_epoch(session: Session, progress: Progress) -> Progress:
    found = _validate(session)
    row = _row(progress, found)
    scores = {int(size): table["all"]["NDCG@10"] for size, table in found.items()}
    session.log.record("NDCG@10", scores, progress.step)
    value = _selected(found, session.config)
    better = value > progress.best
    if better and session.accelerator.is_main_process:
        state = _own(session).model.state_dict()
        with whole_file(session.folder / BEST) as fresh:
            save_file({n: v.detach().contiguous().cpu() for n, v in state.items()}, fresh)
    progress = Progress(
        epoch=progress.epoch + 1,
        step=progress.step,
        best=value if better else progress.best,
        best_epoch=progress.epoch if better else progress.best_epoch,
        history=(*progress.history, row),
    )
    _save(session, progress)
    return progress


def _validate(session: Session) -> dict[str, Table]:
    objective = _own(session)
    objective.eval()
    # In the precision of training: in float32 a validation takes as long as its epoch.
    with torch.inference_mode(), session.accelerator.autocast():
        device = str(session.accelerator.device)
        scorer = objective.scorer()
        return evaluate(scorer, session.data, "validation", session.config, device=device)


def _selected(found: dict[str, Table], config: Config) -> float:
    values = [table["all"]["NDCG@10"] for table in found.values()]
    return values[-1] if config.select_by == "largest" else sum(values) / len(values)


def _row(progress: Progress, found: dict[str, Table]) -> dict[str, float]:
    losses = {name: total / progress.counts[name] for name, total in progress.losses.items()}
    ndcg = {f"NDCG@10 {size}": table["all"]["NDCG@10"] for size, table in found.items()}
    return {"epoch": progress.epoch + 1, "seconds": round(progress.seconds, 2), **losses, **ndcg}


def _save(session: Session, progress: Progress) -> None:
    parts = {"objective": _own(session), "optimizer": session.optimizer}
    save_run(session.folder / STATE, parts, vars(progress))


def _own(session: Session) -> Any:
    """The objective without what processes wrap around it."""
    return session.accelerator.unwrap_model(session.objective)
