"""Prints the peak memory of loading and slicing a checkpoint of 2 GB, over that of importing torch.

    python tests/benchmarks/storage_memory.py [--gigabytes 2] [--folder DIR] [--nesting masked]

Each row runs in a process of its own and reports its peak resident memory (mapped pages count)
above that of a process that imported torch. Allowed: 1.3 times the sub-model, the largest tensor
of the checkpoint, and 100 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

MB = 2**20
WIDTH, HIDDEN, VOCABULARY = 2048, 8192, 32_000
SIZES = [256, 512, 1024, 2048]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """Bytes of the sub-model, and of the checkpoint's largest tensor."""

    result: int
    largest: int

    @property
    def allowed(self) -> int:
        """The peak that the library promises."""
        return int(1.3 * self.result) + self.largest + 100 * MB


def main() -> None:
    """Writes the checkpoint, runs every row and prints the table."""
    options = _options()
    if options.row:
        _run(options.row, Path(options.folder), options.size)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _write(Path(folder), options)
        print("| what | size | result MB | peak over import MB | allowed MB | seconds |")
        print("|---|---|---|---|---|---|")
        failed = [_start(row, size, folder) for row in ROWS for size in SIZES]
    raise SystemExit(any(failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--nesting", choices=("masked", "sliced"), default="masked")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(row: str, size: int, folder: str) -> int:
    words = [sys.executable, __file__, "--row", row, "--folder", folder, "--size", str(size)]
    return subprocess.run(words, check=False).returncode


def _write(folder: Path, options: argparse.Namespace) -> None:
    import matryoshkafy as mk

    dtype = DTYPES[options.dtype]
    layer = dtype.itemsize * 2 * WIDTH * HIDDEN
    count = round((options.gigabytes * 1e9 - dtype.itemsize * VOCABULARY * WIDTH) / layer)
    model = _net(max(1, count)).to(dtype)
    ids = torch.randint(0, VOCABULARY, (2, 3))
    doll = mk.convert(model, (ids,), sizes=SIZES, nesting=options.nesting)
    mk.save(doll, folder / "doll")


def _net(layers: int) -> torch.nn.Module:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(WIDTH)
            self.up = torch.nn.Linear(WIDTH, HIDDEN)
            self.down = torch.nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    blocks = [Block() for _ in range(layers)]
    return torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), *blocks)


def _load(folder: Path, size: int) -> Measured:
    """mk.load(folder, size=m), digests checked."""
    import matryoshkafy as mk

    small = mk.load(folder / "doll", size=size)
    return _measured(folder, sum(p.nbytes for p in small.parameters()))


def _slice(folder: Path, size: int) -> Measured:
    """matryoshkafy slice doll --size m -o OUT."""
    from matryoshkafy_cli.main import app

    target = folder / f"slice-{size}"
    words = ["slice", str(folder / "doll"), "--size", str(size), "-o", str(target), "--force"]
    with contextlib.redirect_stdout(io.StringIO()):
        app()([*words, "--json"], standalone_mode=False)
    return _measured(folder, (target / "model.safetensors").stat().st_size)


def _measured(folder: Path, result: int) -> Measured:
    from matryoshkafy.files.tensors import TensorFile

    with TensorFile(folder / "doll" / "model.safetensors") as file:
        infos = [file.info(name) for name in file.names]
    sizes = [torch.Size(i.shape).numel() * i.dtype.itemsize for i in infos]
    return Measured(result, max(sizes))


ROWS: Mapping[str, Callable[[Path, int], Measured]] = {"load": _load, "slice": _slice}


def _run(row: str, folder: Path, size: int) -> None:
    before, start = _peak(), time.perf_counter()
    found = ROWS[row](folder, size)
    seconds, over = time.perf_counter() - start, _peak() - before
    cells = (size, found.result // MB, over // MB, found.allowed // MB, f"{seconds:.1f}")
    print(f"| {row} | " + " | ".join(map(str, cells)) + " |", flush=True)
    if over > found.allowed:
        raise SystemExit(f"{row}: {over // MB} MB over the import, {found.allowed // MB} allowed")


def _peak() -> int:
    # Linux's ru_maxrss keeps the peak of the parent across exec; VmHWM starts afresh.
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
