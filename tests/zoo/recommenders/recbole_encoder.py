"""The transformer encoder that UniSRec and VQ-Rec take from RecBole: post-norm, additive mask."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Heads of a fixed dim, output, residual, norm."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attn_dropout, self.out_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.size()[:-1], self.heads, self.head_size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self._split(self.query(x)).permute(0, 2, 1, 3)
        key = self._split(self.key(x)).permute(0, 2, 3, 1)
        value = self._split(self.value(x)).permute(0, 2, 1, 3)
        scores = torch.matmul(query, key) / math.sqrt(self.head_size) + mask
        weights = self.attn_dropout(F.softmax(scores, dim=-1))
        mixed = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        mixed = mixed.view(*mixed.size()[:-2], self.heads * self.head_size)
        return self.LayerNorm(self.out_dropout(self.dense(mixed)) + x)


class FeedForward(nn.Module):
    """Two linears, residual, norm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense_2(F.gelu(self.dense_1(x)))) + x)


class TransformerLayer(nn.Module):
    """Attention, then the feed-forward net."""

    def __init__(self, heads: int, width: int, inner: int) -> None:
        super().__init__()
        self.multi_head_attention = MultiHeadAttention(heads, width)
        self.feed_forward = FeedForward(width, inner)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(self.multi_head_attention(x, mask))


class TransformerEncoder(nn.Module):
    """The layers, and a list of what each gave."""

    def __init__(self, heads: int, width: int, inner: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TransformerLayer(heads, width, inner) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        every = []
        for layer in self.layer:
            x = layer(x, mask)
            every.append(x)
        return every


def attention_mask(item_seq: torch.Tensor) -> torch.Tensor:
    """Return 0 where a position may look, -10000 at the future and at padding [B, 1, L, L]."""
    seen = (item_seq != 0).unsqueeze(1).unsqueeze(2)
    allowed = torch.tril(seen.expand((-1, -1, item_seq.size(-1), -1)))
    return torch.where(allowed, 0.0, -10000.0)


def gather_indexes(output: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the vector [B, D] at one position of each sequence [B, L, D]."""
    wide = index.view(-1, 1, 1).expand(-1, -1, output.shape[-1])
    return output.gather(dim=1, index=wide).squeeze(1)
