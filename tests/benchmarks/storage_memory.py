"""Prints the peak memory of loading and slicing a checkpoint of 2 GB, over that of importing torch.

    python tests/benchmarks/storage_memory.py [--gigabytes 2] [--folder DIR] [--nesting masked]

    python tests/benchmarks/storage_memory.py --rows hf

Each row runs in a process of its own and reports its peak resident memory (mapped pages count)
above that of a process that imported torch. Allowed: 1.3 times the sub-model, the largest tensor
of the checkpoint, and 100 MB; where a stock model is written (hf: a LLaMA), 300 MB, of which the
import of transformers takes a part.
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
from typing import Any

import torch

MB = 2**20
WIDTH, HIDDEN, VOCABULARY = 2048, 8192, 32_000
SIZES = [256, 512, 1024, 2048]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """Bytes of the sub-model, of the checkpoint's largest tensor, and of what is allowed beside."""

    result: int
    largest: int
    beside: int = 100 * MB

    @property
    def allowed(self) -> int:
        """The peak that the library promises."""
        return int(1.3 * self.result) + self.largest + self.beside


def main() -> None:
    """Writes the checkpoint, runs every row and prints the table."""
    options = _options()
    if options.row:
        _run(options.row, Path(options.folder), options.size)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in dict.fromkeys(DOLLS[row] for row in options.rows):
            _write(Path(folder) / name, options)
        print("| what | size | result MB | peak over import MB | allowed MB | seconds |")
        print("|---|---|---|---|---|---|")
        failed = [_start(row, size, folder) for row in options.rows for size in SIZES]
    raise SystemExit(any(failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--nesting", choices=("masked", "sliced"), default="masked")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=["load", "slice"])
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(row: str, size: int, folder: str) -> int:
    words = [sys.executable, __file__, "--row", row, "--folder", folder, "--size", str(size)]
    return subprocess.run(words, check=False).returncode


def _write(folder: Path, options: argparse.Namespace) -> None:
    import matryoshkafy as mk

    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    numbers = round(options.gigabytes * 1e9 / dtype.itemsize)
    ids = torch.randint(0, VOCABULARY, (2, 3))
    if folder.name == "llama":
        llama, source = _llama(numbers).to(dtype), folder.parent / "original"
        llama.config.save_pretrained(source)
        call = {"input_ids": ids, "use_cache": False}
        mk.save(mk.convert(llama, (), call, sizes=SIZES, nesting="sliced"), folder, source=source)
        return
    model = _net(numbers).to(dtype)
    mk.save(mk.convert(model, (ids,), sizes=SIZES, nesting=options.nesting), folder)


def _llama(numbers: int) -> Any:
    import transformers

    layer = 4 * WIDTH**2 + 3 * WIDTH * 5632
    count = round((numbers - 2 * VOCABULARY * WIDTH) / layer)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=5632,
        num_hidden_layers=max(1, count),
        num_attention_heads=16,
    )
    config.architectures = ["LlamaForCausalLM"]
    return transformers.LlamaForCausalLM(config).eval()


def _net(numbers: int) -> torch.nn.Module:
    layers = max(1, round((numbers - VOCABULARY * WIDTH) / (2 * WIDTH * HIDDEN)))

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
    return _measured(folder / "doll", sum(p.nbytes for p in small.parameters()))


def _slice(folder: Path, size: int) -> Measured:
    """matryoshkafy slice doll --size m -o OUT."""
    from matryoshkafy_cli.main import app

    return _measured(folder / "doll", _cut(folder / "doll", size, app()))


def _hf(folder: Path, size: int) -> Measured:
    """matryoshkafy slice llama --size m --to hf -o OUT."""
    from matryoshkafy_cli.main import app

    written = _cut(folder / "llama", size, app(), "--to", "hf")
    return _measured(folder / "llama", written, 300 * MB)


def _cut(doll: Path, size: int, command: Callable[..., object], *more: str) -> int:
    """Run the command line; return the bytes of the weights that it wrote."""
    target = doll.parent / f"slice-{size}"
    words = ["slice", str(doll), "--size", str(size), "-o", str(target), "--force", "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        command([*words, *more], standalone_mode=False)
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))


def _measured(doll: Path, result: int, beside: int = 100 * MB) -> Measured:
    from matryoshkafy.files.tensors import TensorFile

    with TensorFile(doll / "model.safetensors") as file:
        infos = [file.info(name) for name in file.names]
    sizes = [torch.Size(i.shape).numel() * i.dtype.itemsize for i in infos]
    return Measured(result, max(sizes), beside)


ROWS: Mapping[str, Callable[[Path, int], Measured]] = {"load": _load, "slice": _slice, "hf": _hf}
DOLLS: Mapping[str, str] = {"load": "doll", "slice": "doll", "hf": "llama"}


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
