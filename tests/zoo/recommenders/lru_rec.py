"""LRURec (Yue et al., WSDM 2024): linear recurrent units, computed by recursive halving."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories
from tests.zoo.registry import Built, Scale, entry


def eigenvalues(size: int, low: float = 0.8, high: float = 0.99) -> torch.Tensor:
    """Draw the logarithms of decay, angle and gain, [3, size]."""
    u1, u2 = torch.rand(size), torch.rand(size)
    nu = torch.log(-0.5 * torch.log(u1 * (high**2 - low**2) + low**2))
    theta = torch.log(u2 * torch.tensor(math.pi) * 2)
    radius = torch.abs(torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta))))
    return torch.vstack((nu, theta, torch.log(torch.sqrt(1 - radius**2))))


def scan(h: torch.Tensor, decay: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """h_t + decay * h_(t-1) over [B, L, D], L a power of two, by joining halves ever larger."""
    batch, length, width = h.shape
    for i in range(1, math.ceil(math.log2(length)) + 1):
        span = 2**i
        h = h.reshape(batch * length // span, span, width)
        first, second = h[:, : span // 2], h[:, span // 2 :]
        keep = mask.reshape(batch * length // span, span)[:, span // 2 - 1 : span // 2]
        if i > 1:
            decay = torch.cat((decay, decay * decay[-1]), 0)
        second = second + decay * first[:, -1:] * keep.unsqueeze(-1)
        h = torch.cat([first, second], dim=1)
    return h


class LRULayer(nn.Module):
    """The unit on complex states, then dropout, residual and norm."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.params_log = nn.Parameter(eigenvalues(states))
        self.in_proj = nn.Linear(width, states).to(torch.cfloat)
        self.out_proj = nn.Linear(states, width).to(torch.cfloat)
        self.out_vector = nn.Identity()
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        nu, theta, gamma = torch.exp(self.params_log).split((1, 1, 1))
        decay = torch.exp(torch.complex(-nu, theta))
        h = scan(self.in_proj(x.to(torch.cfloat)) * gamma, decay, mask)
        return self.layer_norm(self.dropout(self.out_proj(h).real) + self.out_vector(x))


class PositionwiseFeedForward(nn.Module):
    """Two linears, residual, norm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.activation(self.w_1(x)))
        return self.layer_norm(self.dropout(self.w_2(hidden)) + x)


class LRUBlock(nn.Module):
    """A recurrent layer, then the feed-forward net."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.lru_layer = LRULayer(scale(32), scale(64))
        self.feed_forward = PositionwiseFeedForward(scale(32), scale(128))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(self.lru_layer(x, mask))


class LRUEmbedding(nn.Module):
    """Items, normed, and where they are not padding."""

    def __init__(self, width: int, items: int) -> None:
        super().__init__()
        self.token = nn.Embedding(items, width)
        self.layer_norm = nn.LayerNorm(width)
        self.embed_dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer_norm(self.embed_dropout(self.token(ids))), ids > 0


class LRUModel(nn.Module):
    """Pads to a power of two, runs the blocks, scores by the table and a bias."""

    def __init__(self, scale: Scale, items: int) -> None:
        super().__init__()
        self.lru_blocks = nn.ModuleList(LRUBlock(scale) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(items))

    def forward(self, x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        missing = 2 ** int(math.ceil(math.log2(length))) - length
        x, mask = F.pad(x, (0, 0, missing, 0, 0, 0)), F.pad(mask, (missing, 0, 0, 0))
        for block in self.lru_blocks:
            x = block(x, mask)
        return torch.matmul(x[:, -length:], table.permute(1, 0)) + self.bias


class LRURec(nn.Module):
    """The recommender: scores of every item at every position."""

    def __init__(self, scale: Scale, items: int = ITEMS) -> None:
        super().__init__()
        self.embedding = LRUEmbedding(scale(32), items)
        self.model = LRUModel(scale, items)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, mask = self.embedding(ids)
        return self.model(x, self.embedding.token.weight, mask)


@entry("published_lru_rec", FAMILY, tags=("complex",))
def lru_rec(scale: Scale) -> Built:
    return LRURec(scale), (histories(),), {}
