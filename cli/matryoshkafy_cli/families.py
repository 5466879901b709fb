"""The steps from a text encoder to a family of sizes; each leaves a file and is done once."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy
from matryoshkafy.deploy.profile import size_of
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.training import Recipe, distil
from matryoshkafy_cli.screen import CommandError, table
from matryoshkafy_cli.text_encoders import Embedder, TextEncoder, load_encoder

START, RUN, REPORT = "start", "run", "report.json"
CALIBRATION, HELD_OUT = 256, 400


@dataclass(frozen=True)
class Task:
    """What a family is made of: where from, which sizes, how long, where to."""

    folder: Path
    sizes: str
    texts: tuple[str, ...]
    steps: int
    length: int
    output: Path
    seed: int = 0


@dataclass(frozen=True)
class SizeRow:
    """One size beside the full model: agreement of its vectors on held-out texts, and its cost.

    `spearman` of all pairwise cosines, `neighbours` the share of the ten nearest that are found;
    `rate` texts a second on this machine, one thread.
    """

    size: int
    spearman: float
    neighbours: float
    parameters: int
    rate: float
    folder: str


@dataclass(frozen=True)
class Parts:
    """The split of the texts: to train on, to calibrate with, to measure."""

    train: list[str]
    held: list[str]

    @property
    def calibration(self) -> list[str]:
        """The first texts of the training part."""
        return self.train[:CALIBRATION]


def split(texts: Sequence[str], seed: int) -> Parts:
    """Return a split that depends on the seed and the number of distinct texts alone."""
    distinct = list(dict.fromkeys(t for t in texts if t.strip()))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [distinct[i] for i in order]
    held = min(HELD_OUT, len(shuffled) // 5)
    if held < 20:
        raise CommandError(
            f"{len(distinct)} distinct texts were given; expected at least 100, of which a fifth "
            "is held out. Give more texts."
        )
    return Parts(shuffled[held:], shuffled[:held])


def make(task: Task, step: Callable[[str], Any]) -> list[SizeRow]:
    """Carry out what is not done yet, and return the rows of the sizes."""
    parts = split(task.texts, task.seed)
    encoder = load_encoder(task.folder, task.length)
    teacher = copy.deepcopy(encoder.embedder).requires_grad_(False)
    with step("tracing and planning"):
        doll = converted(encoder, task, parts)
    with step("ordering the units"):
        started(doll, encoder, task, parts)
    if task.steps:
        recipe = Recipe(steps=task.steps, seed=task.seed, save=50)
        collate = encoder.batch
        report = distil(
            doll, teacher, parts.train, recipe, collate=collate, folder=task.output / RUN
        )
        (task.output / "distil.txt").write_text(f"{report}\n", encoding="utf-8")
    with step("cutting, writing and measuring the sizes"):
        natives = {m: written(doll, encoder, task, m) for m in doll.sizes}
        rows = measured(natives, teacher, encoder, parts)
    found = {"sizes": [asdict(row) for row in rows], "steps": task.steps, "seed": task.seed}
    (task.output / REPORT).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return rows


def converted(encoder: TextEncoder, task: Task, parts: Parts) -> Doll:
    """Return the doll of the embedder; it shares the encoder's parameters."""
    example = encoder.batch(parts.train[:2])
    return matryoshkafy.convert(
        encoder.embedder, (), example, sizes=task.sizes, nesting="sliced"
    ).eval()


def started(doll: Doll, encoder: TextEncoder, task: Task, parts: Parts) -> None:
    """Rotate and order the units, or take the start that was made before."""
    place = task.output / START
    if place.is_dir():
        _take(doll, matryoshkafy.load(place))
        return
    texts = parts.calibration
    batches = [encoder.batch(texts[i : i + 32]) for i in range(0, len(texts), 32)]
    report = matryoshkafy.rotate(doll, batches, by="contribution", unread="leave")
    (task.output / "order.txt").write_text(f"{report}\n", encoding="utf-8")
    matryoshkafy.save(doll, place)


def _take(doll: Doll, saved: nn.Module) -> None:
    state = doll.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in saved.state_dict().items():
            state[name].copy_(tensor)


def written(doll: Doll, encoder: TextEncoder, task: Task, size: int) -> Embedder:
    """Write the folder of a size in the encoder's own class; return it with its pooling.

    The class is checked against the doll at this size, pooling and all.
    """
    own = encoder.embedder
    inner = matryoshkafy.convert(
        own.model, (), _example(encoder), sizes=list(doll.sizes), nesting="sliced"
    ).eval()
    model = matryoshkafy.native(matryoshkafy.slice(inner, size), like=encoder.builder)
    small = Embedder(model, own.pooling, normalised=own.normalised).eval()
    example = encoder.batch(["one text", "and another, longer text"])
    with torch.no_grad():
        error = relative_error(small(**example), doll.outputs(**example)[size])
    if not error <= 1e-4:
        raise CommandError(
            f"the class at size {size} computes other vectors than the doll (by {error:.1e}); "
            "nothing was written for it. Save the doll and slice it instead."
        )
    encoder.save(model, task.output / f"size-{size}")
    return small


def _example(encoder: TextEncoder) -> dict[str, Tensor]:
    return encoder.batch(["one text", "and another, longer text"])


def measured(
    natives: Mapping[int, Embedder], teacher: nn.Module, encoder: TextEncoder, parts: Parts
) -> list[SizeRow]:
    """Return the rows of the sizes on the held-out texts."""
    truth, _ = vectors(teacher, encoder, parts.held)
    rows = []
    for size, small in natives.items():
        found, seconds = vectors(small, encoder, parts.held)
        spearman, neighbours = agreement(found, truth)
        parameters, _ = size_of(small)
        rate = len(parts.held) / seconds
        rows.append(SizeRow(size, spearman, neighbours, parameters, rate, f"size-{size}"))
    return rows


def vectors(
    model: nn.Module, encoder: TextEncoder, texts: Sequence[str], batch: int = 32
) -> tuple[Tensor, float]:
    """Return [texts, width], and the seconds that it took."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    tokens = [encoder.batch([texts[i] for i in part]) for part in batches]
    start = time.perf_counter()
    with torch.no_grad():
        found = torch.cat([model(**part) for part in tokens])
    seconds = time.perf_counter() - start
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return found[back], seconds


def agreement(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return Spearman's correlation of all pairwise cosines, and the share of the ten nearest
    neighbours that are the same.
    """
    a, b = (F.normalize(x.double(), dim=-1) for x in (found, truth))
    first, second = a @ a.t(), b @ b.t()
    upper = torch.triu_indices(len(a), len(a), 1)
    ranks = [s[upper[0], upper[1]].argsort().argsort().double() for s in (first, second)]
    spearman = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    nearest = [s.fill_diagonal_(-2).topk(min(10, len(a) - 1)).indices for s in (first, second)]
    same = (nearest[0][:, :, None] == nearest[1][:, None]).any(-1)
    return spearman, float(same.double().mean())


def shown(rows: Sequence[SizeRow], output: Path) -> str:
    """Return the rows as a table."""
    cells = [
        (
            str(row.size),
            f"{row.spearman:.3f}",
            f"{row.neighbours:.3f}",
            f"{row.parameters:,}",
            f"{row.rate:.0f}",
            str(output / row.folder),
        )
        for row in rows
    ]
    heads = ("size", "spearman", "neighbours", "parameters", "texts/s", "folder")
    return table("agreement with the full model on held-out texts", heads, cells)
