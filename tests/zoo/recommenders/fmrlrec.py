"""fMRLRec (Wang et al., EMNLP Findings 2024), as published: already nested, by concatenation.

Each layer is a row of small ones, one for each size; layer j reads the first s_j units and writes
the units from s_(j-1) to s_j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import normal
from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories
from tests.zoo.recommenders.lru_rec import eigenvalues, scan
from tests.zoo.registry import Built, Scale, entry

SIZES = (8, 16, 32)
LANGUAGE, IMAGE = 40, 24


def steps(sizes: Sequence[int]) -> list[int]:
    """Return what each size adds to the one before."""
    return [b - a for a, b in zip((0, *sizes), sizes, strict=False)]


class MRLSquareLinearLayer(nn.Module):
    """One linear for each size, laid side by side."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        for i, (inputs, outputs) in enumerate(zip(sizes, steps(sizes), strict=True)):
            setattr(self, f"mrl_linear_{i}", nn.Linear(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [
            getattr(self, f"mrl_linear_{i}")(x[..., :size]) for i, size in enumerate(self.sizes)
        ]
        return torch.cat(parts, dim=-1)


class MRLLayerNorm(nn.Module):
    """One norm for what each size adds."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        for i, step in enumerate(steps(sizes)):
            setattr(self, f"layernorm_{i}", nn.LayerNorm(step))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        starts = (0, *self.sizes)
        parts = [
            getattr(self, f"layernorm_{i}")(x[..., starts[i] : size])
            for i, size in enumerate(self.sizes)
        ]
        return torch.cat(parts, dim=-1)


class LRULayer(nn.Module):
    """The linear recurrent unit between two nested complex linears."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.params_log = nn.Parameter(eigenvalues(sizes[-1], 0.01, 0.1))
        self.in_proj = MRLSquareLinearLayer(sizes).to(torch.cfloat)
        self.out_proj = MRLSquareLinearLayer(sizes).to(torch.cfloat)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        nu, theta, gamma = torch.exp(self.params_log).split((1, 1, 1))
        decay = torch.exp(torch.complex(-nu, theta))
        h = scan(self.in_proj(x.to(torch.cfloat)) * gamma, decay, mask)
        return self.dropout(self.out_proj(h).real)


class PositionwiseFeedForward(nn.Module):
    """A gated net of nested linears."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.gate, self.w_1, self.w_2 = (MRLSquareLinearLayer(sizes) for _ in range(3))
        self.activation, self.dropout = nn.SiLU(), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.gate(x)) * self.dropout(self.w_1(x))
        return self.dropout(self.w_2(hidden))


class LRUBlock(nn.Module):
    """Both in residuals, normed before."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.input_layernorm, self.post_lru_layernorm = MRLLayerNorm(sizes), MRLLayerNorm(sizes)
        self.lru_layer = LRULayer(sizes)
        self.feed_forward = PositionwiseFeedForward(sizes)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.lru_layer(self.input_layernorm(x), mask)
        return x + self.feed_forward(self.post_lru_layernorm(x))


class LRUEmbedding(nn.Module):
    """Frozen features of text and picture, projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_lang = nn.Embedding.from_pretrained(normal(ITEMS, LANGUAGE), padding_idx=0)
        self.token_img = nn.Embedding.from_pretrained(normal(ITEMS, IMAGE), padding_idx=0)
        self.projector = nn.Linear(LANGUAGE + IMAGE, width)
        self.embed_dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([self.token_lang(ids), self.token_img(ids)], dim=-1)
        return self.embed_dropout(self.projector(both)), ids > 0


class LRUModel(nn.Module):
    """The scores of every size, one below the other along the batch."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.lru_blocks = nn.ModuleList(LRUBlock(sizes) for _ in range(2))

    def forward(self, x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        missing = 2 ** int(math.ceil(math.log2(length))) - length
        x, mask = F.pad(x, (0, 0, missing, 0, 0, 0)), F.pad(mask, (missing, 0, 0, 0))
        for block in self.lru_blocks:
            x = block(x, mask)
        x = x[:, -length:]
        scores = [x[..., :s] @ table[..., :s].permute(1, 0) for s in self.sizes]
        return torch.cat(scores, dim=0)


class LRU(nn.Module):
    """The published recommender."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.embedding = LRUEmbedding(sizes[-1])
        self.model = LRUModel(sizes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, mask = self.embedding(ids)
        features = [self.embedding.token_lang.weight, self.embedding.token_img.weight]
        return self.model(x, self.embedding.projector(torch.cat(features, dim=-1)), mask)


@entry("published_fmrlrec", FAMILY, tags=("complex", "frozen-table", "nested-already"))
def fmrlrec(scale: Scale) -> Built:
    kept = [size for size in SIZES if size <= scale(SIZES[-1])]  # a small one has whole pieces
    model = LRU(kept)
    # A slice returns what its doll does: where a size has left, the scores of the largest that is
    # there stand in its place. The class gives as many where it is asked for as many.
    model.model.sizes = tuple(min(size, kept[-1]) for size in SIZES)
    return model, (histories(),), {}
