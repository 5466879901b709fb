"""What a trace must not disturb or print: modes of modules, streams, logging."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Whatever train() or eval() sets inside, every module leaves as it came."""
    modes = {m: m.training for model in models for m in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """torch prints the whole graph when it fails: the error says what a person needs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as sink,
            contextlib.redirect_stderr(sink),
            contextlib.redirect_stdout(sink),
        ):
            yield
    finally:
        logging.disable(before)
