"""How work is divided: functions over parts, here or by Ray; and who of several processes begins.

`prepare` and `encode` work on parts of users and of items, which meet only in counts per item. So
any engine that maps will do: Ray's tasks here, over files that all workers see (`--set workers=2`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from examples.fmrlrec.config import ConfigError

# each(function, parts, *shared): function(part, *shared) of every part, the results in order.
Each = Callable[..., list[Any]]


def serially(function: Callable[..., Any], parts: Sequence[Any], *shared: Any) -> list[Any]:
    """One part after the other, in this process."""
    return [function(part, *shared) for part in parts]


def each_on(workers: int) -> Each:
    """Parts on the workers of Ray: of the cluster that is there, or `workers` on this machine.

    With 0 they stay in this process.
    """
    if not workers:
        return serially
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("--set workers=N needs Ray: pip install ray") from error
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def each(function: Callable[..., Any], parts: Sequence[Any], *shared: Any) -> list[Any]:
        # What all parts need is stored once, not sent with each.
        stored = [ray.put(value) for value in shared]
        remote: Any = ray.remote(function)
        return ray.get([remote.remote(part, *stored) for part in parts])

    return each


def device() -> str:
    """Where a process computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Processes(NamedTuple):
    """Which of how many processes this one is; `wait` returns when all have come to it."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], object] = bool


def processes() -> Processes:
    """This process among those of torchrun; the first call waits for the others."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if device() == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device() == "cuda" else "gloo")
    return Processes(dist.get_rank(), count, dist.barrier)


@contextmanager
def first_process_first() -> Generator[None, None, None]:
    """One process does the work of a block, then the others find what it left."""
    own = processes()
    if own.rank > 0:
        own.wait()
    yield
    if own.rank == 0:
        own.wait()
