"""Published recommenders as one kind of model: histories [B, T] -> scores of all items.

The models are those of `tests.zoo.recommenders`, at the size of a real catalogue. A kind of batch
goes with each: what a position learns, and where the score of the next item is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.fmrlrec.data import Dataset, left_pad
from examples.fmrlrec.model import Recommender, Shape
from tests.zoo.recommenders.bert4rec import BERT4Rec, PositionalEmbedding
from tests.zoo.recommenders.fmlp_rec import FMLPRecModel
from tests.zoo.recommenders.hstu import HSTU
from tests.zoo.recommenders.lru_rec import LRURec
from tests.zoo.recommenders.sasrec import SASRec
from tests.zoo.registry import Scale

Pairs = tuple[np.ndarray, np.ndarray]
MASKED = 0.6  # of the positions of a history, for the cloze task: the authors' choice for Beauty


class Next(SASRec):
    """SASRec whose forward scores every item at every position."""

    def forward(self, log_seqs: Tensor) -> Tensor:
        """log_seqs int64 [B, T] -> [B, T, items]."""
        return F.linear(self.log2feats(log_seqs), self.item_emb.weight)


class LastPositions(PositionalEmbedding):
    """The positions that end a history, so that what pads it at the left need not be there."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T] -> [1, T, width]."""
        return self.pe.weight[-x.size(1) :].unsqueeze(0)


class TiedBERT4Rec(BERT4Rec):
    """BERT4Rec whose scores are those of the paper's equation 7: by the table of its inputs.

    The zoo's, as the PyTorch code that it follows, learns a second table of items, which so few
    interactions do not teach. A norm stands before the table, as in BERT's own head.
    """

    def __init__(self, width: int, heads: int, longest: int, items: int) -> None:
        super().__init__(width, heads, 4 * width, longest, items)
        self.bert.embedding.position = LastPositions(longest, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(items))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> [B, T, items]."""
        hidden = self.norm(F.gelu(self.out(self.bert(ids))))
        return F.linear(hidden, self.bert.embedding.token.weight, self.bias)


@dataclass(frozen=True)
class Recipe:
    """How one of the models is made and trained; the same nested and alone.

    `tokens` are ids beside the items (0 pads, BERT4Rec's mask is the last one). `batches` turns
    training rows [B, T + 1] into inputs and targets. `pads_right`: histories begin at the first
    position, so that a causal model never sees padding and a batch is as long as its longest
    history; `skips_padding`: what pads at the left changes nothing, so it is left out where batches
    are of histories of like length; `lengths`: a trace of the model takes one length alone, so it
    is converted at these, too; `asks_by_mask`: the next item is asked for by a mask behind the
    history;
    `every_position` has scores, else the last one alone, and every prefix of a history is a row.
    """

    build: Callable[[int, int, int], nn.Module]
    batches: Callable[[np.ndarray, np.random.Generator], Pairs]
    tokens: int = 1
    pads_right: bool = False
    skips_padding: bool = False
    lengths: tuple[int, ...] = ()
    asks_by_mask: bool = False
    every_position: bool = True
    dropout: float = 0.5
    rate: float = 1e-3
    decay: float = 1e-2
    batch: int = 128
    epochs: int = 60


def shifted(rows: np.ndarray, _: np.random.Generator) -> Pairs:
    """Every position learns the next item: inputs and targets [B, length], 0 where there is none.

    Histories end at the last position.
    """
    inputs = rows[:, :-1]
    return inputs, np.where(inputs > 0, rows[:, 1:], 0)


def shifted_right(rows: np.ndarray, random: np.random.Generator) -> Pairs:
    """As `shifted`, but histories begin at the first position."""
    inputs, targets = (moved_left(torch.from_numpy(p)).numpy() for p in shifted(rows, random))
    return inputs, targets


def moved_left(padded: Tensor) -> Tensor:
    """Rows [B, T] padded on the left, padded on the right instead."""
    empty = (padded == 0).sum(1, keepdim=True)
    places = torch.arange(padded.shape[1], device=padded.device) + empty
    moved = padded.gather(1, places.clamp_max(padded.shape[1] - 1))
    return moved * (places < padded.shape[1])


def last_item(rows: np.ndarray, _: np.random.Generator) -> Pairs:
    """The last position alone learns."""
    return rows[:, :-1], rows[:, -1]


def listed(rows: np.ndarray) -> np.ndarray:
    """Every prefix of at least two items as a row of its own, as FMLP-Rec's loader has them."""
    counts, parts = (rows > 0).sum(1), [rows]
    for left_out in range(1, rows.shape[1] - 1):
        some = rows[counts - left_out >= 2]
        parts.append(np.pad(some[:, :-left_out], ((0, 0), (left_out, 0))))
    return np.concatenate(parts)


def cloze(rows: np.ndarray, random: np.random.Generator) -> Pairs:
    """Some positions are masked (id -1 until `masked_ids`) and learn what stood there.

    The last position is masked in every fourth sequence, which is what evaluation asks.
    """
    whole = rows[:, 1:]
    hidden = random.random(whole.shape) < MASKED
    only_last = random.random(len(whole)) < 0.25
    hidden[only_last] = False
    hidden[only_last, -1] = True
    hidden &= whole > 0
    return np.where(hidden, -1, whole), np.where(hidden, whole, 0)


def ended_anywhere(rows: np.ndarray, random: np.random.Generator, share: float = 0.75) -> Pairs:
    """As `cloze`; but so many of the sequences end anywhere, and their last item alone is masked.

    That is what evaluation asks, of as many histories as a causal model learns from.
    """
    inputs, targets = cloze(rows, random)
    chosen = random.random(len(rows)) < share
    whole = rows[chosen, 1:]
    left_out = random.integers(np.maximum((whole > 0).sum(1) - 1, 1))
    before = np.arange(whole.shape[1]) - left_out[:, None]
    whole = np.where(before < 0, 0, np.take_along_axis(whole, before.clip(0), axis=1))
    targets[chosen], targets[chosen, -1] = 0, whole[:, -1]
    whole[:, -1] = -1
    inputs[chosen] = whole
    return inputs, targets


def sasrec(items: int, width: int, length: int) -> nn.Module:
    """SASRec with the authors' two blocks and one head."""
    return Next(width, longest=length, items=items)


def lrurec(items: int, width: int, length: int) -> nn.Module:
    """LRURec with the authors' two blocks; states are twice as many as units."""
    del length
    return LRURec(Scale(width / 32), items)


def bert4rec(items: int, width: int, length: int) -> nn.Module:
    """BERT4Rec of two blocks with heads of eight units, so that a size is a number of heads."""
    return TiedBERT4Rec(width, max(1, width // 8), length, items)


def fmlp_rec(items: int, width: int, length: int) -> nn.Module:
    """FMLP-Rec with the authors' two layers."""
    return FMLPRecModel(width, 4 * width, length, items)


def hstu(items: int, width: int, length: int) -> nn.Module:
    """HSTU of two layers with heads of eight units, so that a size is a number of heads."""
    return HSTU(width, max(1, width // 8), longest=length, items=items)


def fmrlrec(items: int, width: int, length: int) -> nn.Module:
    """The example's recommender on ids: fMRLRec without language and image."""
    del length
    return Recommender(Shape(items - 1, width, r_min=0.8))


RECIPES = {
    "sasrec": Recipe(sasrec, shifted_right, pads_right=True, epochs=40),
    "hstu": Recipe(hstu, shifted_right, pads_right=True, epochs=40),
    "lrurec": Recipe(lrurec, shifted, skips_padding=True, lengths=(8, 16, 32), epochs=40),
    "fmrlrec": Recipe(fmrlrec, shifted, skips_padding=True, epochs=40),
    "bert4rec": Recipe(
        bert4rec, cloze, tokens=2, skips_padding=True, asks_by_mask=True, dropout=0.2, epochs=150
    ),
    "bert4rec-next": Recipe(
        bert4rec, ended_anywhere, tokens=2, skips_padding=True, asks_by_mask=True, dropout=0.2
    ),
    "fmlprec": Recipe(fmlp_rec, last_item, every_position=False, batch=512, epochs=40),
}


@torch.no_grad()
def small(model: nn.Module, dropout: float, seed: int) -> nn.Module:
    """Draws matrices and tables small, as LRURec does, and sets the dropout everywhere.

    Complex weights and eigenvalues keep what torch and their authors draw.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = dropout
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_complex():
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    return model


def training_rows(data: Dataset, length: int) -> np.ndarray:
    """What is learnt from [N, length + 1], 0 before its first item.

    The last items of each user before validation and test.
    """
    parts = (data.sequence(user)[:-2][-length - 1 :] for user in range(data.users))
    return left_pad([part for part in parts if len(part) >= 2], length + 1)


def epoch_batches(
    rows: np.ndarray, recipe: Recipe, seed: int, epoch: int, *, alike: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch, a function of seed and epoch alone.

    `alike`: where padding is at the right or skipped, batches are of histories of like length and
    as long as their longest. Otherwise all are random ones of one shape.
    """
    random = np.random.default_rng((seed, epoch))
    sort = alike and (recipe.pads_right or recipe.skips_padding)
    if sort:
        parts = alike_parts(rows, recipe.batch, random)
    else:
        parts = random_parts(len(rows), recipe.batch, random, whole=not alike)
    for some in parts:
        pair = recipe.batches(rows[some], random)
        if sort:
            longest = int((pair[0] != 0).sum(1).max())
            kept = slice(longest) if recipe.pads_right else slice(-longest, None)
            pair = pair[0][:, kept], pair[1][:, kept]
        yield torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def random_parts(
    count: int, batch: int, random: np.random.Generator, *, whole: bool
) -> list[np.ndarray]:
    """Rows in random order, `batch` in each part; `whole` leaves out what fills none."""
    order = random.permutation(count)
    order = order[: count - count % batch] if whole else order
    return np.split(order, range(batch, len(order), batch))


def alike_parts(rows: np.ndarray, batch: int, random: np.random.Generator) -> list[np.ndarray]:
    """Rows of like length, in parts with about as many items as `batch` random rows have.

    In parts of as many rows, an item of a short history would count several times one of a long.
    """
    counts = (rows > 0).sum(1)
    order = random.permutation(len(rows))
    order = order[np.argsort(counts[order], kind="stable")]
    total, parts = np.cumsum(counts[order] - 1), max(1, round(len(rows) / batch))
    cuts = np.searchsorted(total, total[-1] * np.arange(1, parts) / parts)
    found = [part for part in np.split(order, cuts) if len(part)]
    return [found[i] for i in random.permutation(len(found))]
