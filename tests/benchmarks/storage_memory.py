"""Prints the peak memory of slicing a checkpoint of 2 GB, over that of importing torch.

    python tests/benchmarks/storage_memory.py [--gigabytes 2] [--folder DIR]

Each row runs in a process of its own and reports its peak resident memory (mapped pages count).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from matryoshkafy.tensor_files import Entry, TensorFile, write_tensors

MB = 2**20
BLOCK = {"q": (4096, 4096), "o": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}
VOCABULARY = (32000, 4096)


def main() -> None:
    """Writes the checkpoint, runs every row and prints the table."""
    options = _options()
    if options.row:
        _run(options.row, Path(options.folder))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _write_checkpoint(Path(folder), options.gigabytes)
        print("| what | result MB | peak over import MB | allowed MB | seconds |")
        print("|---|---|---|---|---|")
        for row in ROWS:
            command = [sys.executable, __file__, "--row", row, "--folder", folder]
            subprocess.run(command, check=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_checkpoint(folder: Path, gigabytes: float) -> None:
    shapes = {"embed": VOCABULARY}
    layer = sum(4 * rows * columns for rows, columns in BLOCK.values())
    for i in range(max(1, round((gigabytes * 1e9 - 4 * 32000 * 4096) / layer))):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in BLOCK.items()}
    entries = [Entry(n, s, torch.float32, lambda s=s: torch.rand(s)) for n, s in shapes.items()]
    write_tensors(folder / "model.safetensors", entries)
    tall = Entry("tall", (65536, 4096), torch.float32, lambda: torch.rand(65536, 4096))
    write_tensors(folder / "tall.safetensors", [tall])


def _halves(file: TensorFile) -> Iterator[Entry]:
    for name in file.names:
        shape = tuple(n // 2 for n in file.info(name).shape)
        cut = [[(0, n)] for n in shape]
        yield Entry(name, shape, torch.float32, lambda n=name, c=cut: file.read_slice(n, c))


def _stream(folder: Path) -> tuple[int, int]:
    """Slices every dim to half into a file, holding one tensor at a time."""
    with TensorFile(folder / "model.safetensors") as file:
        write_tensors(folder / "half.safetensors", _halves(file))
    largest = 4 * VOCABULARY[0] * VOCABULARY[1] // 4
    return (folder / "half.safetensors").stat().st_size, largest + 64 * MB


def _hold(folder: Path) -> tuple[int, int]:
    """Slices every dim to half and holds all of it, as a load at a size does."""
    with TensorFile(folder / "model.safetensors") as file:
        held = [entry.supply() for entry in _halves(file)]
    result = sum(tensor.nbytes for tensor in held)
    return result, int(1.3 * result) + 4 * VOCABULARY[0] * VOCABULARY[1] + 100 * MB


def _columns(folder: Path) -> tuple[int, int]:
    """Takes 1/8 of the columns of one tensor of 1 GB, in two segments."""
    with TensorFile(folder / "tall.safetensors") as file:
        result = file.read_slice("tall", [None, [(0, 256), (2048, 2304)]]).nbytes
    return result, result + 64 * MB


ROWS = {"stream to a file": _stream, "hold in memory": _hold, "columns of 1 GB": _columns}


def _run(row: str, folder: Path) -> None:
    before, start = _peak(), time.perf_counter()
    result, allowed = ROWS[row](folder)
    seconds, over = time.perf_counter() - start, _peak() - before
    cells = (result // MB, over // MB, allowed // MB, f"{seconds:.1f}")
    print(f"| {row} | " + " | ".join(map(str, cells)) + " |", flush=True)
    if over > allowed:
        raise SystemExit(f"{row}: {over // MB} MB over the import, {allowed // MB} MB allowed")


def _peak() -> int:
    # Linux's ru_maxrss keeps the peak of the parent across exec; VmHWM starts afresh.
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
