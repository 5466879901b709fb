"""BERT4Rec (Sun et al., CIKM 2019), structure and names of the PyTorch code of the VAE comparison.

Its LayerNorm is written by hand with the unbiased deviation, positions are a whole table, and the
sublayers are `x + dropout(layer(norm(x)))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import LENGTH
from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories
from tests.zoo.registry import Built, Scale, entry

Function = Callable[[torch.Tensor], torch.Tensor]


class LayerNorm(nn.Module):
    """a_2 (x - mean) / (std + eps) + b_2, std over n - 1."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(features))
        self.b_2 = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class SublayerConnection(nn.Module):
    """x + dropout(layer(norm(x)))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = LayerNorm(size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, sublayer: Function) -> torch.Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class MultiHeadedAttention(nn.Module):
    """Heads of a fixed dim; a mask of zeros fills with -1e9."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.d_k, self.h = width // heads, heads
        self.linear_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.output_linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch = x.size(0)
        query, key, value = (
            layer(x).view(batch, -1, self.h, self.d_k).transpose(1, 2)
            for layer in self.linear_layers
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        weights = self.dropout(F.softmax(scores.masked_fill(mask == 0, -1e9), dim=-1))
        mixed = torch.matmul(weights, value).transpose(1, 2).contiguous()
        return self.output_linear(mixed.view(batch, -1, self.h * self.d_k))


class PositionwiseFeedForward(nn.Module):
    """Two linears with the tanh form of GELU, written out."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.w_1(x)
        inner = math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))
        return self.w_2(self.dropout(0.5 * h * (1 + torch.tanh(inner))))


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward net, each in its connection."""

    def __init__(self, hidden: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = MultiHeadedAttention(heads, hidden)
        self.feed_forward = PositionwiseFeedForward(hidden, inner)
        self.input_sublayer, self.output_sublayer = (SublayerConnection(hidden) for _ in range(2))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.input_sublayer(x, lambda h: self.attention(h, mask))
        return self.dropout(self.output_sublayer(x, self.feed_forward))


class PositionalEmbedding(nn.Module):
    """A table of positions, repeated for the batch."""

    def __init__(self, longest: int, width: int) -> None:
        super().__init__()
        self.pe = nn.Embedding(longest, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pe.weight.unsqueeze(0).repeat(x.size(0), 1, 1)


class BERTEmbedding(nn.Module):
    """Tokens plus positions."""

    def __init__(self, size: int, longest: int, items: int) -> None:
        super().__init__()
        self.token = nn.Embedding(items, size, padding_idx=0)
        self.position = PositionalEmbedding(longest, size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.token(ids) + self.position(ids))


class BERT(nn.Module):
    """The encoder: every position attends to every item."""

    def __init__(self, hidden: int, heads: int, inner: int, longest: int, items: int) -> None:
        super().__init__()
        self.embedding = BERTEmbedding(hidden, longest, items)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(hidden, heads, inner) for _ in range(2)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (ids > 0).unsqueeze(1).repeat(1, ids.size(1), 1).unsqueeze(1)
        x = self.embedding(ids)
        for block in self.transformer_blocks:
            x = block(x, mask)
        return x


class BERT4Rec(nn.Module):
    """Scores of every item at every position by a linear of its own."""

    def __init__(
        self, hidden: int, heads: int, inner: int, longest: int = LENGTH, items: int = ITEMS
    ) -> None:
        super().__init__()
        self.bert = BERT(hidden, heads, inner, longest, items)
        self.out = nn.Linear(hidden, items)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.bert(ids))


@entry("published_bert4rec", FAMILY)
def bert4rec(scale: Scale) -> Built:
    return BERT4Rec(scale(32), scale(4), scale(128)), (histories(),), {}
