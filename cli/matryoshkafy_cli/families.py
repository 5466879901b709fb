"""The steps from a pretrained model to a family of sizes; each leaves a file and is done once."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import matryoshkafy
from matryoshkafy.deploy.profile import device_of, size_of
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import Corrections, Recipe, Term, distil
from matryoshkafy.units.norm_scales import norm_scales
from matryoshkafy_cli.screen import CommandError, table

START, RUN, REPORT = "start", "run", "report.json"
# Steps that bring a full model back whose post-norm streams were turned: after 200, most of
# MiniLM's smaller sizes stand above those of a permuted start.
SETTLED = 200
# Steps from which one size a step is ahead of one size a row: behind after 100, level after 600.
LONG = 1000
CALIBRATION, HELD_OUT, BATCH = 256, 400, 32

Step = Callable[[str], AbstractContextManager[Any]]


class Subject(Protocol):
    """A pretrained model of some kind, with what it reads.

    `train` rows to learn from, `lengths` theirs (None: all alike); `held` rows to measure with.
    """

    model: nn.Module
    train: Sequence[Any]
    lengths: Sequence[int] | None
    held: Sequence[Any]

    def batch(self, rows: Sequence[Any]) -> Any:
        """Return a batch of rows, as the model takes it."""
        ...

    def terms(self, doll: Doll) -> tuple[Term, ...]:
        """Return what a size learns from the full model."""
        ...

    def quality(self, model: nn.Module, truth: Any) -> tuple[dict[str, float], Any]:
        """Measure a model on the held-out rows; also return what the full model's is held
        against, as `truth` for the others.
        """
        ...

    def write(self, doll: Doll, small: GraphModule, folder: Path) -> nn.Module:
        """Write a slice of the doll as a folder of the model's own class, and return it."""
        ...


@dataclass(frozen=True)
class Task:
    """What a family is made of: its sizes, how long it is distilled, where it goes.

    `untie`: a head that is its table gets a weight of its own first. `device`: where it is
    distilled, which is where the time goes; each size learns corrections of its own, too. Without
    steps each size below the largest gets weights of its own, fitted to the full model.
    """

    sizes: str
    steps: int
    output: Path
    seed: int = 0
    untie: bool = False
    device: str = "cpu"

    @property
    def turned(self) -> bool:
        """Whether post-norm streams are turned, too: the full model does not survive it unmoved,
        and a long distillation brings it back.
        """
        return self.steps >= SETTLED

    def place(self, name: str) -> Path:
        """Return where the start or the run is: a run goes on from the start that it began with."""
        return self.output / (f"{name}-turned" if self.turned else name)


@dataclass(frozen=True)
class SizeRow:
    """One size: quality by name on held-out rows, and its cost; `rate` rows a second, here."""

    size: int
    quality: Mapping[str, float]
    parameters: int
    rate: float
    folder: str

    def as_json(self) -> dict[str, Any]:
        """Return the row with every quality under its own name."""
        rest = {"parameters": self.parameters, "rate": self.rate, "folder": self.folder}
        return {"size": self.size, **self.quality, **rest}


def chosen_device(device: str | None) -> str:
    """Return the device that was asked for, or the best of this machine.

    Raises:
        ProfileError: this machine has no such device.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return str(device_of(device or best))


def split(rows: Sequence[Any], seed: int, what: str) -> tuple[list[Any], list[Any]]:
    """Return (train, held): a split by the seed and the number of rows alone."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[i] for i in order]
    held = min(HELD_OUT, len(shuffled) // 5)
    if held < 20:
        raise CommandError(
            f"{len(rows)} distinct {what} were given; expected at least 100, of which a fifth is "
            f"held out. Give more {what}."
        )
    return shuffled[held:], shuffled[:held]


def make(subject: Subject, task: Task, step: Step) -> list[SizeRow]:
    """Carry out what is not done yet, and return the rows of the sizes."""
    teacher = copy.deepcopy(subject.model).requires_grad_(False).eval()
    with step("tracing and planning"):
        doll = converted(subject, task)
    with step("ordering the units"):
        started(doll, subject, task)
    own = None
    if task.steps:
        with step("distilling"):
            own = distilled(doll, teacher, subject, task)
    with step("cutting, writing and measuring the sizes"):
        rows = measured(doll, teacher, subject, task, own)
    found = {"sizes": [r.as_json() for r in rows], "steps": task.steps, "seed": task.seed}
    (task.output / REPORT).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return rows


def converted(subject: Subject, task: Task) -> Doll:
    """Return the doll of the model; it shares the model's parameters."""
    example = subject.batch(subject.train[:2])
    if task.untie:
        matryoshkafy.untie(subject.model, example)
    return matryoshkafy.convert(subject.model, example, sizes=task.sizes, nesting="sliced").eval()


def started(doll: Doll, subject: Subject, task: Task) -> None:
    """Rotate and order the units, or take the start that was made before."""
    place = task.place(START)
    if place.is_dir():
        _take(doll, matryoshkafy.load(place), place)
        return
    post_norm = "diagonal" if task.turned else "permute"
    report = matryoshkafy.rotate(
        doll, calibration(subject), by="contribution", unread="leave", post_norm=post_norm
    )
    (task.output / "order.txt").write_text(f"{report}\n", encoding="utf-8")
    matryoshkafy.save(doll, place)


def calibration(subject: Subject) -> list[Any]:
    """Return the batches that units are measured on."""
    rows = subject.train[:CALIBRATION]
    return [subject.batch(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def _take(doll: Doll, saved: nn.Module, place: Path) -> None:
    state = doll.state_dict(keep_vars=True)
    mine, theirs = (len(list(one.parameters())) for one in (doll, saved))
    if mine != theirs:
        made = "with --untie" if theirs > mine else "without --untie"
        raise CommandError(
            f"{place} was made {made}, this call is not. Give the same options, or "
            "another --output."
        )
    with torch.no_grad():
        for name, tensor in saved.state_dict().items():
            state[name].copy_(tensor)


def distilled(doll: Doll, teacher: nn.Module, subject: Subject, task: Task) -> Corrections | None:
    """Let every size learn from the full model, or go on where a run was killed; return what each
    size has of its own.
    """
    batch = min(64, len(subject.train))
    terms = subject.terms(doll)
    how: dict[str, Any] = {}
    if task.steps >= LONG and any(term.kind == "similarity" for term in terms):
        # A similarity of all rows of a step; each size learns for about as long, small ones cost
        # less.
        chances = {size: doll.sizes[-1] / size for size in doll.sizes}
        how = {"sizes": "one", "weights": chances}
    recipe = Recipe(task.steps, batch, terms=terms, seed=task.seed, save=50, **how)
    own = Corrections.start(doll, scales=norm_scales(doll, calibration(subject)))
    report = distil(
        doll.to(task.device),
        teacher.to(task.device),
        subject.train,
        recipe,
        collate=subject.batch,
        lengths=subject.lengths,
        folder=task.place(RUN),
        corrections=own,
    )
    for module in (doll, teacher):
        module.cpu()
    (task.output / "distil.txt").write_text(f"{report}\n", encoding="utf-8")
    return report.corrections


def measured(
    doll: Doll, teacher: nn.Module, subject: Subject, task: Task, own: Corrections | None
) -> list[SizeRow]:
    """Write the folder of every size and return its row."""
    _, truth = subject.quality(teacher, None)
    rows = []
    for size in doll.sizes:
        folder = task.output / f"size-{size}"
        cut = own.slice(doll, size) if own else matryoshkafy.slice(doll, size)
        if not task.steps and size < doll.sizes[-1]:
            matryoshkafy.refit(cut, doll, calibration(subject))
        small = subject.write(doll, cut, folder)
        start = time.perf_counter()
        quality, _ = subject.quality(small, truth)
        rate = len(subject.held) / (time.perf_counter() - start)
        parameters, _ = size_of(small)
        rows.append(SizeRow(size, quality, parameters, rate, folder.name))
    return rows


def computed(model: nn.Module, subject: Subject, rows: Sequence[Any]) -> list[Any]:
    """Return the model's outputs for rows, batch by batch in their order."""
    batches = [subject.batch(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    with torch.inference_mode():
        return [model(**b) if isinstance(b, Mapping) else model(*b) for b in batches]


def vectors(
    model: Callable[..., Tensor], encoder: Any, texts: Sequence[str], batch: int = BATCH
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
    names = list(rows[0].quality)
    cells = [
        (
            str(row.size),
            *(f"{row.quality[name]:.3f}" for name in names),
            f"{row.parameters:,}",
            f"{row.rate:.0f}",
            str(output / row.folder),
        )
        for row in rows
    ]
    heads = ("size", *names, "parameters", "rows/s", "folder")
    return table("quality on held-out rows, beside the full model", heads, cells)
