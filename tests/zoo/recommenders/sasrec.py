"""SASRec (Kang and McAuley, ICDM 2018), names as in the PyTorch code that most papers run.

One head is the authors' default.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories
from tests.zoo.registry import Built, Scale, entry


class PointWiseFeedForward(nn.Module):
    """Two convolutions of kernel 1 over the units."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(units, units, kernel_size=1)
        self.dropout1 = nn.Dropout(0.2)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv1d(units, units, kernel_size=1)
        self.dropout2 = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(-1, -2)
        hidden = self.relu(self.dropout1(self.conv1(turned)))
        return self.dropout2(self.conv2(hidden)).transpose(-1, -2)


class SASRec(nn.Module):
    """Causal self-attention over the history; the last feature scores every item."""

    def __init__(
        self, units: int, heads: int = 1, *, blocks: int = 2, longest: int = 20, items: int = ITEMS
    ) -> None:
        super().__init__()
        self.item_emb = nn.Embedding(items, units, padding_idx=0)
        self.pos_emb = nn.Embedding(longest + 1, units, padding_idx=0)
        self.emb_dropout = nn.Dropout(0.2)
        norms = [nn.LayerNorm(units, eps=1e-8) for _ in range(2 * blocks)]
        self.attention_layernorms = nn.ModuleList(norms[:blocks])
        self.attention_layers = nn.ModuleList(
            nn.MultiheadAttention(units, heads, 0.2) for _ in range(blocks)
        )
        self.forward_layernorms = nn.ModuleList(norms[blocks:])
        self.forward_layers = nn.ModuleList(PointWiseFeedForward(units) for _ in range(blocks))
        self.last_layernorm = nn.LayerNorm(units, eps=1e-8)

    def log2feats(self, log_seqs: torch.Tensor) -> torch.Tensor:
        """Return a feature for every position [B, L, D]."""
        seqs = self.item_emb(log_seqs)
        seqs *= self.item_emb.embedding_dim**0.5
        length = log_seqs.shape[1]
        places = torch.arange(1, length + 1, device=log_seqs.device).unsqueeze(0)
        seqs += self.pos_emb(places * (log_seqs != 0))
        seqs = self.emb_dropout(seqs)
        ones = torch.ones((length, length), dtype=torch.bool, device=log_seqs.device)
        mask = ~torch.tril(ones)
        for i in range(len(self.attention_layers)):
            seqs = torch.transpose(seqs, 0, 1)
            mixed, _ = self.attention_layers[i](seqs, seqs, seqs, attn_mask=mask)
            seqs = torch.transpose(self.attention_layernorms[i](seqs + mixed), 0, 1)
            seqs = self.forward_layernorms[i](seqs + self.forward_layers[i](seqs))
        return self.last_layernorm(seqs)

    def predict(self, log_seqs: torch.Tensor, item_indices: torch.Tensor) -> torch.Tensor:
        """Return the scores of some items for each history [B, items]."""
        last = self.log2feats(log_seqs)[:, -1, :]
        return self.item_emb(item_indices).matmul(last.unsqueeze(-1)).squeeze(-1)

    def forward(
        self, log_seqs: torch.Tensor, pos_seqs: torch.Tensor, neg_seqs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        feats = self.log2feats(log_seqs)
        pos, neg = self.item_emb(pos_seqs), self.item_emb(neg_seqs)
        return (feats * pos).sum(dim=-1), (feats * neg).sum(dim=-1)


def _built(model: SASRec) -> Built:
    ids = histories()
    return model, (ids, ids.roll(-1, 1), (ids * 7 + 3) % ITEMS), {}


@entry("published_sasrec", FAMILY, tags=("width-scalar", "one-head"))
def one_head(scale: Scale) -> Built:
    return _built(SASRec(scale(32)))


@entry("published_sasrec_two_heads", FAMILY, tags=("width-scalar",))
def two_heads(scale: Scale) -> Built:
    return _built(SASRec(scale(32), scale(4)))
