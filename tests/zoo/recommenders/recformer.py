"""RecFormer (Li et al., KDD 2023): items as sentences, read by a Longformer; cosine scores.

A window of tokens is attended to locally, in blocks; the first token attends to all and is attended
to by all, with projections of its own. The encoder here is small but keeps the structure.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import normal, padded, tokens
from tests.zoo.recommenders.histories import FAMILY, ITEMS
from tests.zoo.registry import Built, Scale, entry

VOCABULARY, PAD = 97, 1
REACH = 2
FAR = -1e9


def blocks_of(x: torch.Tensor, reach: int) -> torch.Tensor:
    """[N, L, d] -> [N, L / reach, d, 3 reach]: each block with its neighbours, zeros outside."""
    return F.pad(x, (0, 0, reach, reach)).unfold(1, 3 * reach, reach)


def banded(query: torch.Tensor, key: torch.Tensor, reach: int) -> torch.Tensor:
    """Return q k' for keys at most `reach` away [N, L / reach, reach, 3 reach], far ones at FAR."""
    # Chunks of two blocks that overlap by one; their quarters are written where they belong.
    left, right = (x.unfold(1, 2 * reach, reach).transpose(-1, -2) for x in (query, key))
    chunks = torch.einsum("ncxd,ncyd->ncxy", left, right)
    count = chunks.shape[1] + 1
    scores = chunks.new_full((chunks.shape[0], count, reach, 3 * reach), FAR)
    scores[:, :-1, :, reach:] = chunks[:, :, :reach, :]
    scores[:, 1:, :, : 2 * reach] = chunks[:, :, reach:, :]
    at = torch.arange(3 * reach, device=query.device) - reach
    far = (at[None, :] - torch.arange(reach, device=query.device)[:, None]).abs() > reach
    return scores.masked_fill(far, FAR)


class LongformerSelfAttention(nn.Module):
    """Local attention for every token, global attention for the first."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.query_global, self.key_global, self.value_global = (
            nn.Linear(width, width) for _ in range(3)
        )

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = self._local(x, mask)
        out[:, 0] = self._global(x, mask)
        return out

    def _local(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query = self._heads(self.query(x) / math.sqrt(self.head_dim)).flatten(0, 1)
        key, value = (self._heads(f(x)).flatten(0, 1) for f in (self.key, self.value))
        near = blocks_of(mask.unsqueeze(-1), REACH).repeat_interleave(self.num_heads, 0) == 0
        scores = banded(query, key, REACH).masked_fill(near, FAR)
        first = torch.einsum("nld,nd->nl", query, key[:, 0]).view(*scores.shape[:3], 1)
        weights = F.softmax(torch.cat((first, scores), dim=-1), dim=-1)
        weights = weights * (mask != 0).repeat_interleave(self.num_heads, 0).view(
            *weights.shape[:3], 1
        )
        mixed = torch.einsum("ncxy,ncdy->ncxd", weights[..., 1:], blocks_of(value, REACH))
        mixed = mixed + weights[..., :1] * value[:, 0].view(-1, 1, 1, self.head_dim)
        mixed = mixed.reshape(batch, self.num_heads, length, self.head_dim)
        return mixed.transpose(1, 2).reshape(batch, length, width)

    def _global(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self._heads(self.query_global(x[:, :1]) / math.sqrt(self.head_dim))
        key, value = self._heads(self.key_global(x)), self._heads(self.value_global(x))
        scores = (query @ key.transpose(-1, -2)).masked_fill((mask == 0)[:, None, None], FAR)
        return (F.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(1)


class SelfOutput(nn.Module):
    """Linear, residual, norm."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(inputs, width), nn.Dropout(0.1)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class LongformerLayer(nn.Module):
    """Attention, then the feed-forward net, names as in transformers."""

    def __init__(self, heads: int, width: int, inner: int) -> None:
        super().__init__()
        parts = {
            "self": LongformerSelfAttention(heads, width),
            "output": SelfOutput(width, width),
        }
        self.attention = nn.ModuleDict(parts)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = SelfOutput(inner, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class RecformerEmbeddings(nn.Module):
    """Tokens, their place, their type (key, value), and the place of their item."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(24, width, padding_idx=PAD)
        self.token_type_embeddings = nn.Embedding(4, width)
        self.item_position_embeddings = nn.Embedding(8, width)
        self.LayerNorm, self.dropout = nn.LayerNorm(width, eps=1e-5), nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(24).expand((1, -1)))

    def forward(
        self, ids: torch.Tensor, types: torch.Tensor, item_places: torch.Tensor
    ) -> torch.Tensor:
        real = ids.ne(PAD).int()
        places = (torch.cumsum(real, dim=1).type_as(real) * real).long() + PAD
        x = self.word_embeddings(ids) + self.position_embeddings(places)
        x = x + self.token_type_embeddings(types) + self.item_position_embeddings(item_places)
        return self.dropout(self.LayerNorm(x))


class RecformerModel(nn.Module):
    """Pads to whole windows, encodes, takes the first token."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.embeddings = RecformerEmbeddings(scale(32))
        layers = (LongformerLayer(scale(4), scale(32), scale(64)) for _ in range(1))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        types: torch.Tensor,
        item_places: torch.Tensor,
    ) -> torch.Tensor:
        window = 2 * REACH
        missing = (window - ids.shape[1] % window) % window
        if missing > 0:
            ids = F.pad(ids, (0, missing), value=PAD)
            mask, types, item_places = (F.pad(t, (0, missing)) for t in (mask, types, item_places))
        x = self.embeddings(ids, types, item_places)
        for layer in self.encoder["layer"]:
            x = layer(x, mask.float())
        return x[:, 0]


class Similarity(nn.Module):
    """Cosine divided by a temperature."""

    def __init__(self, temp: float = 0.05) -> None:
        super().__init__()
        self.temp, self.cos = temp, nn.CosineSimilarity(dim=-1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.cos(x, y) / self.temp


class RecformerForSeqRec(nn.Module):
    """Scores of every item; the vectors of the items are encoded beforehand and frozen."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.longformer = RecformerModel(scale)
        self.sim = Similarity()
        self.item_embedding = nn.Embedding.from_pretrained(normal(ITEMS, scale(32)), freeze=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        item_position_ids: torch.Tensor,
    ) -> torch.Tensor:
        user = self.longformer(input_ids, attention_mask, token_type_ids, item_position_ids)
        return self.sim(user.unsqueeze(1), self.item_embedding.weight.unsqueeze(0))


@entry("published_recformer", FAMILY, tags=("writes", "frozen-table"))
def recformer(scale: Scale) -> Built:
    ids = tokens()
    mask = padded()
    ids = torch.where(mask == 1, ids, PAD)
    return RecformerForSeqRec(scale), (ids, mask, ids % 3, ids % 5), {}
