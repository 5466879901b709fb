"""VQ-Rec (Hou et al., WWW 2023): an item is the mean of code embeddings, its codes are fixed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import LENGTH
from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories, lengths
from tests.zoo.recommenders.recbole_encoder import (
    TransformerEncoder,
    attention_mask,
    gather_indexes,
)
from tests.zoo.registry import Built, Scale, entry

CODES, CODE_CAP = 6, 11


def codes() -> torch.Tensor:
    """Draw the codes of every item, each book in its own range; item 0 has none."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, CODE_CAP, (ITEMS, CODES), generator=draw)
    chosen = chosen + torch.arange(CODES) * (CODE_CAP + 1) + 1
    chosen[0] = 0
    return chosen


class VQRec(nn.Module):
    """Cosine of the history with every item, divided by a temperature."""

    def __init__(self, scale: Scale, temperature: float = 0.07) -> None:
        super().__init__()
        width = scale(32)
        self.temperature = temperature
        self.pq_codes = codes()  # a plain attribute, as in the authors' code
        self.pq_code_embedding = nn.Embedding(CODES * (1 + CODE_CAP), width, padding_idx=0)
        self.position_embedding = nn.Embedding(LENGTH, width)
        self.trm_encoder = TransformerEncoder(scale(4), width, scale(64))
        self.trans_matrix = nn.Parameter(torch.randn(CODES, CODE_CAP + 1, CODE_CAP + 1))
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.2)

    def encode(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Return one vector for each history [B, D]."""
        places = torch.arange(item_seq.size(1), dtype=torch.long, device=item_seq.device)
        places = self.position_embedding(places.unsqueeze(0).expand_as(item_seq))
        items = self.pq_code_embedding(self.pq_codes[item_seq]).mean(dim=-2)
        x = self.dropout(self.LayerNorm(items + places))
        return gather_indexes(self.trm_encoder(x, attention_mask(item_seq))[-1], item_seq_len - 1)

    def calculate_item_emb(self) -> torch.Tensor:
        """Return the vectors of all items [items, D]."""
        return self.pq_code_embedding(self.pq_codes).mean(dim=-2)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        user = F.normalize(self.encode(item_seq, item_seq_len), dim=-1)
        items = F.normalize(self.calculate_item_emb(), dim=-1)
        logits = torch.matmul(user, items.transpose(0, 1))
        logits /= self.temperature
        return logits


@entry("published_vq_rec", FAMILY)
def vq_rec(scale: Scale) -> Built:
    ids = histories().flip(1)
    return VQRec(scale), (ids, lengths(ids)), {}
