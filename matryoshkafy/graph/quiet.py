"""What a trace must not disturb or print: modes of modules, streams, logging, other threads."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import warnings
from collections.abc import Generator

import torch
from torch import nn

# torch.export keeps its state in globals: one trace at a time.
TRACING = threading.RLock()


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Generator[None, None, None]:
    """Whatever train() or eval() sets inside, every module leaves as it came."""
    modes = {m: m.training for model in models for m in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def plain_attention() -> Generator[None]:
    """Without the fast path of torch's encoder layers, which runs under `no_grad` alone, is one op
    to a trace, and writes zeros where a padding mask hides.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def uncollected() -> Generator[None]:
    """A trace makes millions of objects that live until its end: looking for garbage among them
    again and again takes a tenth of its time.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class _OtherThreads(logging.Filter):
    """Lets the records of every thread pass but of the one that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record comes from another thread."""
        return record.thread != self.here


@contextlib.contextmanager
def silent() -> Generator[None, None, None]:
    """torch prints the whole graph when it fails: the error says what a person needs.

    No stream is swapped and no level is set, which other threads would notice: this thread's log
    records are dropped, and `print` is shadowed in the one module of torch that prints a graph.
    """
    from torch.export import _trace as torch_export  # slow to import, and needed here alone

    mute, handlers = _OtherThreads(), _handlers()
    with TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for handler in handlers:
            handler.addFilter(mute)
        inside = "print" in vars(torch_export)  # a trace within a check is silent already
        torch_export.print = _nothing  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if not inside:
                del torch_export.print  # type: ignore[attr-defined]
            for handler in handlers:
                handler.removeFilter(mute)


def _nothing(*args: object, **kwargs: object) -> None:
    del args, kwargs


def _handlers() -> list[logging.Handler]:
    named = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(log for log in named if isinstance(log, logging.Logger))]
    last = [logging.lastResort] if logging.lastResort is not None else []
    return [*last, *(handler for log in loggers for handler in log.handlers)]
