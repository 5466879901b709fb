"""What holds for every test: one thread, the checkout importable, GPU tests skipped saying why."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIMIT_MINUTES = 12.0
STARTED = pytest.StashKey[float]()

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    """Compute on one thread: results then do not depend on the machine, nor on the workers."""
    config.stash[STARTED] = time.monotonic()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(absent)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say so where the quick tests have grown out of their time."""
    minutes = (time.monotonic() - config.stash[STARTED]) / 60
    if "not slow" in config.getoption("markexpr") and minutes > LIMIT_MINUTES:
        terminalreporter.write_line(
            f"the quick tests took {minutes:.1f} minutes, over {LIMIT_MINUTES:.0f} on 2 cores: "
            "mark what is slow with @pytest.mark.slow (durations above)",
            yellow=True,
        )
