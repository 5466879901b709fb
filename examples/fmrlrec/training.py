"""The training loop: FSDP2, TensorBoard, resumed at any step to the same bits.

Batches are a function of (seed, epoch), the learning rate of the step, and everything else that a
run has accumulated is in a folder of `matryoshkafy.training` that replaces its predecessor whole.
Several processes (torchrun) divide the rows of each batch, and under FSDP2 each holds a part of the
item table, of every other parameter and of their gradients and moments.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from examples.fmrlrec.config import Config, DataError, RunError
from examples.fmrlrec.data import PADDING, Batch, Dataset, training_batches, training_windows
from examples.fmrlrec.evaluation import Table, evaluate
from examples.fmrlrec.nesting import StaggeredLoss, nested_scorer
from examples.fmrlrec.workers import Processes, device, processes
from matryoshkafy.files.folders import whole_file
from matryoshkafy.report.page.numbers import timed
from matryoshkafy.training import AllSizes, RunLog, full_state, resume_run, save_run

STATE, BEST = "state", "best.safetensors"
LAST_RATE = 0.02  # of the learning rate is left at the end of a cosine
SCALES_FACTOR = 10  # scales of scores travel further than weights
COLUMNS = 8  # sizes that fit a line of 80 characters


@dataclass
class Progress:
    """Where a run stands: the next batch, the losses of this epoch, the best one, the history.

    `losses` are the sum of the batches so far that had a loss, and how many they were.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = -1
    history: tuple[dict[str, float], ...] = ()


def train(objective: AllSizes, data: Dataset, config: Config, folder: Path) -> Progress:
    """Trains until `config.epochs` or `config.patience`; the best weights are in `folder`.

    A run that was killed goes on from its last checkpoint there: bit for bit on a CPU, if on as
    many threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(objective, data, config, folder)
    progress = session.progress
    with session.log as log:
        while not finished(progress, config):
            session.epoch()
            for line in log_lines(progress):
                log.bar.console.print(line, highlight=False, markup=False)
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
    head = "epoch        time  loss" + "".join(f"{size:>7}" for size in shown)
    star = "*" if progress.best_epoch == progress.epoch - 1 else ""
    row = f"{progress.epoch:4} {timed(last['seconds']):>12}{last['loss']:6.4g}"
    row += "".join(f"{found[size]:7.4f}" for size in shown) + star
    above = ["validation NDCG@10 by size, a line an epoch, * the best so far", head]
    return [*above, row] if len(progress.history) == 1 else [row]


def parameter_groups(objective: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and the recurrence's eigenvalues do not.

    `factor` multiplies the learning rate of a group.
    """
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        is_scale = name.startswith("loss.")
        key = decay if parameter.dim() >= 2 else 0.0, SCALES_FACTOR if is_scale else 1
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": wanted, "factor": factor}
        for (wanted, factor), parameters in groups.items()
    ]


def autocast(config: Config) -> torch.autocast:
    """The precision of a run."""
    half = config.precision == "bf16" or (config.precision == "auto" and device() == "cuda")
    return torch.autocast(device(), torch.bfloat16, enabled=half)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the weights of `path` into `model`."""
    if not path.exists():
        raise RunError(f"no {path.name} in {path.parent}; run `train` first")
    model.load_state_dict(load_file(path))


def learning_rate(step: int, total: int, config: Config) -> float:
    """Rises over `warmup` steps; then stays, or falls as a cosine until the last of `total`."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
    return rate if config.schedule == "constant" else rate * cosine(min(1.0, step / total))


def cosine(share: float) -> float:
    """From 1 at the start of a training to `LAST_RATE` when all of it (share 1) is done."""
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2


class Session:
    """A run that goes on from where its folder stands."""

    def __init__(self, objective: AllSizes, data: Dataset, config: Config, folder: Path) -> None:
        self.data, self.config, self.folder = data, config, folder
        self.windows = training_windows(data, config)
        if not len(self.windows):
            raise DataError("no user has the four items that one training step needs")
        self.own, self.objective = processes(), objective.to(device())
        if self.own.count > 1:
            fully_shard(objective, mesh=init_device_mesh(device(), (self.own.count,)))
        groups = parameter_groups(objective, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.parts = {"objective": objective, "optimizer": self.optimizer}
        position = resume_run(folder / STATE, self.parts)
        if position is None:
            torch.manual_seed(config.seed)
        self.progress = Progress(**(position or {}))
        self.steps = config.epochs * math.ceil(len(self.windows) / config.batch)
        self.log = RunLog(
            self.steps,
            folder=folder / "tensorboard" if self.own.rank == 0 else None,
            start=self.progress.step,
            every=1,
            console=Console(quiet=True) if self.own.rank else None,
        )

    def epoch(self) -> None:
        """Learns from what is left of an epoch, and closes it."""
        progress, config = self.progress, self.config
        started = time.monotonic() - progress.seconds
        self.objective.train()
        batches = training_batches(self.data, self.windows, config, epoch=progress.epoch)
        for batch in islice(batches, progress.batch, None):
            self._step(batch)
            progress.seconds = time.monotonic() - started
            if config.checkpoint_steps and progress.step % config.checkpoint_steps == 0:
                save_run(self.folder / STATE, self.parts, vars(progress))
        self._close_epoch()

    def _step(self, batch: Batch) -> None:
        objective, progress = self.objective, self.progress
        inputs, targets, share = _share(self.own, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(progress.step, self.steps, self.config)
        cast("StaggeredLoss", objective.loss).at_step(progress.step)
        with autocast(self.config):
            loss, per_size = objective(inputs, labels=targets)
        self.optimizer.zero_grad()
        # Processes average their gradients: weighted by their targets, the sum is one process's.
        (loss * share).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), self.config.clip)
        self.optimizer.step()
        told = torch.stack([loss.detach(), *per_size.values()]) * share / self.own.count
        if self.own.count > 1:
            dist.all_reduce(told)
        total, *parts = told.tolist()
        self.log.step(total, dict(zip(per_size, parts, strict=True)))
        names = ["loss", *(f"loss {size}" for size in per_size)]
        for name, value in zip(names, [total, *parts], strict=True):
            before, count = progress.losses.get(name, (0.0, 0))
            progress.losses[name] = before + value, count + 1
        progress.batch, progress.step = progress.batch + 1, progress.step + 1

    def _close_epoch(self) -> None:
        progress = self.progress
        found = {size: table["all"]["NDCG@10"] for size, table in self._validate().items()}
        self.log.record("NDCG@10", {int(size): v for size, v in found.items()}, progress.step)
        values = [*found.values()]
        value = values[-1] if self.config.select_by == "largest" else sum(values) / len(values)
        if value > progress.best:
            progress.best, progress.best_epoch = value, progress.epoch
            state = full_state(self.objective.doll)
            if self.own.rank == 0:
                with whole_file(self.folder / BEST) as fresh:
                    save_file(state, fresh)
        losses = {name: total / count for name, (total, count) in progress.losses.items()}
        row = {"epoch": progress.epoch + 1, "seconds": round(progress.seconds, 2), **losses}
        row |= {f"NDCG@10 {size}": v for size, v in found.items()}
        progress.history = (*progress.history, row)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.losses, progress.seconds = {}, 0.0
        save_run(self.folder / STATE, self.parts, vars(progress))

    def _validate(self) -> dict[str, Table]:
        objective = self.objective.eval()
        if isinstance(objective, FSDPModule):
            objective.unshard()
        # In the precision of training: in float32 a validation takes as long as its epoch.
        with torch.inference_mode(), autocast(self.config):
            scorer = nested_scorer(objective.doll)
            found = evaluate(scorer, self.data, "validation", self.config, device=device())
        if isinstance(objective, FSDPModule):
            objective.reshard()
        return found


def _share(own: Processes, batch: Batch) -> tuple[Tensor, Tensor, float]:
    """The rows of a batch that belong to this process, and what its mean loss counts for.

    The mean over all targets is the mean over the processes of share times their own means.
    """
    idle = own.rank >= len(batch.inputs)
    mine = slice(0, 1) if idle else slice(own.rank, None, own.count)
    inputs, targets = batch.inputs[mine], batch.targets[mine]
    counted = 0 if idle else (targets != PADDING).sum()
    share = float(counted * own.count / (batch.targets != PADDING).sum())
    return torch.from_numpy(inputs).to(device()), torch.from_numpy(targets).to(device()), share
