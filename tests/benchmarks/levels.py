"""Bytes of a progressive checkpoint: on disk, read for one size, read to upgrade, held for all.

    python -m tests.benchmarks.levels --markdown docs/results/levels.md

Every byte that a tensor file gives is counted once, by wrapping the reader. Masked nesting, sizes
doubling from 64 to 1024, two layers of a transformer and four feed-forward blocks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.files.tensors import TensorFile

SIZES = [64, 128, 256, 512, 1024]
WIDTH, WORDS = 1024, 200


class Feed(nn.Module):
    """Residual feed-forward blocks over an embedding, as in a recommender's trunk."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(blocks))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, L, WORDS]."""
        x = self.embed(ids)
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x @ self.embed.weight.T


class Attention(nn.Module):
    """Two layers of nn.TransformerEncoder over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> scores [N, L, WORDS]."""
        return self.layers(self.embed(ids)) @ self.embed.weight.T


MODELS: dict[str, Callable[[], nn.Module]] = {
    "4 feed-forward blocks": Feed,
    "2 transformer layers": Attention,
}


@dataclass(frozen=True)
class Row:
    """One model in one nesting; everything in bytes."""

    model: str
    nesting: str
    dense: int
    files: tuple[int, ...]
    reads: tuple[int, ...]
    needed: tuple[int, ...]
    upgrades: tuple[int, ...]
    held: int
    apart: int


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count the bytes that tensor files give, by file."""
    read, found = TensorFile._read_some, dict[str, int]()

    def counted(self: TensorFile, target: memoryview, begin: int) -> int:
        count = read(self, target, begin)
        found[self.path.name] = found.get(self.path.name, 0) + count
        return count

    TensorFile._read_some = counted
    try:
        yield found
    finally:
        TensorFile._read_some = read


def weights(model: nn.Module) -> int:
    """The bytes of a model's tensors, ties once."""
    tensors = {id(t): t for t in state_of(model).values()}.values()
    return sum(t.numel() * t.element_size() for t in tensors)


def storages(models: Any) -> int:
    """The bytes of memory behind the tensors of several models."""
    found = {}
    for model in models:
        for tensor in state_of(model).values():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(name: str, nesting: str, folder: Path) -> Row:
    """Pack a model and read it at every size."""
    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6)
    doll = mk.convert(MODELS[name]().eval(), (ids,), sizes=SIZES, nesting=nesting, check=False)
    mk.save(doll, folder / "dense")
    mk.pack(doll, folder / "packed")
    files = [folder / "packed" / f"level-{level}.safetensors" for level in range(len(SIZES))]
    reads, needed, upgrades = [], [], []
    previous = None
    for size in SIZES:
        with counting() as found:
            small = mk.load(folder / "packed", size=size)
        reads.append(sum(found.values()))
        needed.append(weights(small))
        if previous is not None:
            with counting() as found:
                larger = mk.upgrade(previous, folder / "packed", size)
            upgrades.append(sum(found.values()))
            assert all(torch.equal(a, b) for a, b in pairs(larger, small))
        previous = small
    every = mk.slices(doll)
    dense = sum(p.stat().st_size for p in (folder / "dense").glob("*.safetensors"))
    sizes = tuple(p.stat().st_size for p in files)
    apart = sum(weights(small) for small in every.values())
    return Row(name, nesting, dense, sizes, tuple(reads), tuple(needed), tuple(upgrades),
               storages(every.values()), apart)  # fmt: skip


def pairs(one: nn.Module, other: nn.Module) -> Any:
    """The tensors of two models side by side."""
    return zip(state_of(one).values(), state_of(other).values(), strict=True)


def page(rows: list[Row]) -> str:
    """Return the page of results."""
    lines = [
        "# Progressive checkpoints", "",
        "Made by `python -m tests.benchmarks.levels --markdown docs/results/levels.md`, torch\n"
        f"{torch.__version__.partition('+')[0]}, Python {sys.version.split()[0]}. Width {WIDTH}, "
        f"sizes {', '.join(map(str, SIZES))}, float32, random weights, {WORDS} words, no timing.",
        "",
        "`on disk`: all level files against the dense file. `quarter`: bytes that loading size "
        f"{SIZES[2]} reads, against the weights of that size (masked: its structural zeros are "
        "weights that are not read). `upgrade`: bytes that the step from half to full size reads, "
        "against the last file. `held`: memory behind all five sizes from `mk.slices`, against "
        "five separate models. Each file that is read is read once more before, to compare its "
        "digest; manifest and graph, the same for every size, are not counted.", "",
        "| model | nesting | dense | on disk | quarter | upgrade | held |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        quarter, last = row.reads[2] / row.needed[2], row.upgrades[-1] / row.files[-1]
        lines.append(
            f"| {row.model} | {row.nesting} | {row.dense / 1e6:.1f} MB | "
            f"{sum(row.files) / row.dense:.3f} | {quarter:.3f} | {last:.3f} | "
            f"{row.held / 1e6:.1f} of {row.apart / 1e6:.1f} MB |"
        )
    lines += ["", "Bytes of each level's file, and what the sizes read:", "",
              "| model | nesting | " + " | ".join(map(str, SIZES)) + " |",
              "|---|---|" + "---|" * len(SIZES)]  # fmt: skip
    for row in rows:
        for what, values in (("file", row.files), ("read", row.reads), ("weights", row.needed)):
            cells = " | ".join(f"{value / 1e6:.3f} MB" for value in values)
            lines.append(f"| {row.model}: {what} | {row.nesting} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every model in both nestings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    rows = []
    for name in MODELS:
        for nesting in ("masked", "sliced"):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, nesting, Path(folder)))
    text = page(rows)
    print(text)
    if given.markdown:
        given.markdown.write_text(text)


if __name__ == "__main__":
    main()
