"""A text encoder as the subject of a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import matryoshkafy
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import parts_of, state_of
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.training import Term
from matryoshkafy_cli.families import agreement, split, vectors
from matryoshkafy_cli.screen import CommandError
from matryoshkafy_cli.text_encoders import Embedder, TextEncoder, load_encoder

EXAMPLE = ["one text", "and another, longer text"]


@dataclass
class Texts:
    """An encoder and texts; `pairs` (query, its document) of held-out rows, where a task is
    given.
    """

    encoder: TextEncoder
    train: Sequence[str]
    held: Sequence[str]
    pairs: Sequence[tuple[str, str]] = ()
    lengths: Sequence[int] | None = field(init=False)

    def __post_init__(self) -> None:
        read = {"truncation": True, "max_length": self.encoder.length}
        ids = self.encoder.tokenizer(list(self.train), **read)["input_ids"]
        self.lengths = [len(one) for one in ids]

    @property
    def model(self) -> nn.Module:
        """The encoder with its pooling."""
        return self.encoder.embedder

    def batch(self, rows: Sequence[str]) -> dict[str, Tensor]:
        """Return the tokens of texts."""
        return self.encoder.batch(rows)

    def terms(self, doll: Doll) -> tuple[Term, ...]:
        """Return the similarity of the texts of a batch: no basis of the vectors matters to it."""
        del doll
        return (Term("similarity"),)

    def quality(self, model: nn.Module, truth: Tensor | None) -> tuple[dict[str, float], Tensor]:
        """Return how the vectors agree with the full model's, and MRR@10 of the pairs."""
        found, _ = vectors(model, self.encoder, self.held)
        spearman, neighbours = agreement(found, found if truth is None else truth)
        task = {}
        if self.pairs:
            sides = [
                vectors(model, self.encoder, side)[0] for side in zip(*self.pairs, strict=True)
            ]
            task = {"mrr@10": reciprocal_rank(*sides)}
        return {"spearman": spearman, "neighbours": neighbours, **task}, found

    def write(self, doll: Doll, small: GraphModule, folder: Path) -> nn.Module:
        """Write the folder of a size in the encoder's own class; return it with its pooling.

        The class is checked against the slice, pooling and all.
        """
        own, example = self.encoder.embedder, self.encoder.batch(EXAMPLE)
        # Group by group: the sizes alone do not tell widths that were chosen.
        widths = {
            group.name.removeprefix("model."): [int(row[i]) for row in doll.plan.ladder]
            for i, group in enumerate(doll.plan.groups)
            if i != doll.plan.main
        }
        inner = matryoshkafy.convert(
            own.model, (), example, sizes=list(doll.sizes), nesting="sliced", overrides=widths
        ).eval()
        size = parts_of(small)[1].sizes[-1]
        cut = matryoshkafy.slice(inner, size)
        weights = {f"model.{name}": tensor for name, tensor in state_of(cut).items()}
        with torch.no_grad():
            for name, tensor in state_of(small).items():
                weights[name].copy_(tensor)
        model = matryoshkafy.native(cut, like=self.encoder.builder)
        made = Embedder(model, own.pooling, normalised=own.normalised).eval()
        with torch.no_grad():
            error = relative_error(made(**example), small(**example))
        if not error <= 1e-4:
            raise CommandError(
                f"the class at size {size} computes other vectors than its slice (by {error:.1e}); "
                "nothing was written for it. Save the doll and slice it instead."
            )
        self.encoder.save(model, folder)
        return made


def reciprocal_rank(queries: Tensor, documents: Tensor) -> float:
    """Return MRR@10; query i asks for document i."""
    a, b = (F.normalize(x, dim=-1) for x in (queries, documents))
    scores = a @ b.t()
    rank = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float(torch.where(rank <= 10, 1 / rank.double(), 0.0).mean())


def texts_subject(folder: Path, rows: Sequence[Any], length: int, seed: int) -> Texts:
    """Return the subject of a folder and texts, or pairs of a query and its document."""
    encoder = load_encoder(folder, length)
    train, held = split(list(dict.fromkeys(rows)), seed, "texts")
    if not isinstance(rows[0], tuple):
        return Texts(encoder, train, held)
    return Texts(encoder, _flat(train), _flat(held), held)


def _flat(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(text for pair in pairs for text in pair))
