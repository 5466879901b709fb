"""Worker: a process that answers for one entry of the zoo after the other, and may be killed."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Answer = Callable[[str], Any]


def _serve(pipe: Connection, answer: Answer) -> None:
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in iter(pipe.recv, None):
        pipe.send(answer(name))


class Worker:
    """A process of its own; `answer` is a function of a module, called with an entry's name."""

    def __init__(self, answer: Answer) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, answer), daemon=True)
        self.process.start()
        theirs.close()
        self.served = 0

    def ask(self, name: str, limit: float) -> tuple[Any, str]:
        """Return (the answer, ""), or (None, "Timeout" after `limit` seconds or "Crash")."""
        self.served += 1
        try:
            self.pipe.send(name)
            return (self.pipe.recv(), "") if self.pipe.poll(limit) else (None, "Timeout")
        except (EOFError, OSError):
            return None, "Crash"

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
