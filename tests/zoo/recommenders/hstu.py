"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152): attention without a softmax, gated by a unit
of its own, names as in the public code; bias by relative position, no bias by time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories
from tests.zoo.registry import Built, Scale, entry


class RelativePositionalBias(nn.Module):
    """One number for each distance between two places of a history of at most `longest` items."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self._w = nn.Parameter(torch.empty(2 * longest - 1).normal_(mean=0, std=0.02))

    def forward(self, length: int, device: torch.device) -> torch.Tensor:
        """Return [length, length]: row i, column j holds the number of j - i."""
        places = torch.arange(length, device=device)
        return self._w[places[None, :] - places[:, None] + self.longest - 1]


class SequentialTransductionUnit(nn.Module):
    """Gates, values, queries and keys by one product; what is attended to is gated, not mixed."""

    def __init__(self, units: int, heads: int, longest: int) -> None:
        super().__init__()
        self._units, self._num_heads, self._longest = units, heads, longest
        self._uvqk = nn.Parameter(torch.empty(units, 4 * units).normal_(mean=0, std=0.02))
        self._rel_attn_bias = RelativePositionalBias(longest)
        self._o = nn.Linear(units, units)
        nn.init.xavier_uniform_(self._o.weight)
        self._dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
        """x [B, L, D], causal [L, L] of 0 and 1 -> [B, L, D]."""
        mixed = F.silu(torch.matmul(F.layer_norm(x, [self._units], eps=1e-6), self._uvqk))
        u, v, q, k = mixed.split(self._units, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self._num_heads, self._units // self._num_heads)).transpose(1, 2)
            for part in (q, k, v)
        )
        bias = self._rel_attn_bias(x.shape[1], x.device)
        weights = F.silu(q @ k.transpose(-1, -2) + bias) / self._longest * causal
        found = (weights @ v).transpose(1, 2).flatten(2)
        gated = u * F.layer_norm(found, [self._units], eps=1e-6)
        return self._o(self._dropout(gated)) + x


class HSTU(nn.Module):
    """History -> a score for every item at every place."""

    def __init__(
        self, units: int, heads: int, *, blocks: int = 2, longest: int = 20, items: int = ITEMS
    ) -> None:
        super().__init__()
        self._item_emb = nn.Embedding(items, units, padding_idx=0)
        self._pos_emb = nn.Embedding(longest, units)
        for table in (self._item_emb, self._pos_emb):
            nn.init.trunc_normal_(table.weight, std=0.02, a=-0.04, b=0.04)
        self._emb_dropout = nn.Dropout(0.2)
        self._attention_layers = nn.ModuleList(
            SequentialTransductionUnit(units, heads, longest) for _ in range(blocks)
        )

    def forward(self, past_ids: torch.Tensor) -> torch.Tensor:
        """past_ids [B, L] -> scores [B, L, items]."""
        x = self._item_emb(past_ids) * self._item_emb.embedding_dim**0.5
        places = torch.arange(past_ids.shape[1], device=past_ids.device)
        real = (past_ids != 0).unsqueeze(-1).to(x.dtype)
        x = self._emb_dropout(x + self._pos_emb(places)) * real
        causal = torch.ones(places.shape[0], places.shape[0], device=x.device).tril()
        for layer in self._attention_layers:
            x = layer(x, causal) * real
        return F.linear(F.normalize(x, dim=-1, eps=1e-6), self._item_emb.weight)


@entry("published_hstu", FAMILY, tags=("width-scalar",))
def published_hstu(scale: Scale) -> Built:
    return HSTU(scale(32), scale(4)), (histories(),), {}
