"""Saves the same folder over and over, to be killed by test_storage.py; needs no torch."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import matryoshkafy.files.folders as storage

BLOCK = 2**16
STEPS = ("open", "os.", "shutil.", "ctypes.dlsym")


def save(folder: str, *, swap: bool, stop_at: int) -> None:
    """Saves versions 0, 1, ... forever; with stop_at, two, killing itself at that step of them."""
    if not swap:
        storage._exchange = lambda one, other: False
    if stop_at >= 0:
        _kill_at(stop_at)
    for version in range(2) if stop_at >= 0 else itertools.count(os.getpid() * 1000):
        storage.write_folder(folder, _files(version), force=True)
        sys.stdout.write(".")
        sys.stdout.flush()


def _files(version: int) -> dict[str, storage.Writer]:
    def weights(path: Path) -> None:
        with open(path, "wb") as file:
            for _ in range(16):
                file.write(str(version).encode().rjust(16) * (BLOCK // 16))

    def manifest(path: Path) -> None:
        digests = {name: storage.digest_file(path.parent / name) for name in ("a.bin", "b.bin")}
        path.write_text(json.dumps({"format": 1, "version": version, "digests": digests}))

    return {"a.bin": weights, "b.bin": weights, storage.MANIFEST: manifest}


def _kill_at(stop_at: int) -> None:
    steps = itertools.count()

    def hook(event: str, _: object) -> None:
        if event.startswith(STEPS) and next(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
