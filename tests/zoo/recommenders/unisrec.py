"""UniSRec (Hou et al., KDD 2022): frozen text features, whitened and adapted by experts.

Without ids ("inductive") items are their texts alone; with ids ("transductive") an id is added.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import LENGTH, normal
from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories, lengths
from tests.zoo.recommenders.recbole_encoder import (
    TransformerEncoder,
    attention_mask,
    gather_indexes,
)
from tests.zoo.registry import Built, Scale, entry

TEXT = 48


class PWLayer(nn.Module):
    """Parametric whitening: a learned mean is taken off, then a linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.bias = nn.Parameter(torch.zeros(inputs))
        self.lin = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.dropout(x) - self.bias)


class MoEAdaptorLayer(nn.Module):
    """A softmax gate over whitening layers; the gate is noisy while training."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(PWLayer(inputs, outputs) for _ in range(experts))
        self.w_gate = nn.Parameter(torch.zeros(inputs, experts))
        self.w_noise = nn.Parameter(torch.zeros(inputs, experts))

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """Return the share of each expert [..., experts]."""
        logits = x @ self.w_gate
        if self.training:
            spread = F.softplus(x @ self.w_noise) + 1e-2
            logits = logits + torch.randn_like(logits) * spread
        return F.softmax(logits, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.gates(x)
        outputs = torch.cat([expert(x).unsqueeze(-2) for expert in self.experts], dim=-2)
        return (gates.unsqueeze(-1) * outputs).sum(dim=-2)


class UniSRec(nn.Module):
    """Cosine of the history with every item, both through the adaptor."""

    def __init__(self, scale: Scale, *, ids: bool) -> None:
        super().__init__()
        width = scale(32)
        self.item_embedding = nn.Embedding(ITEMS, width, padding_idx=0) if ids else None
        self.position_embedding = nn.Embedding(LENGTH, width)
        self.trm_encoder = TransformerEncoder(scale(4), width, scale(64))
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.2)
        self.plm_embedding = nn.Embedding.from_pretrained(normal(ITEMS, TEXT), freeze=True)
        self.moe_adaptor = MoEAdaptorLayer(3, TEXT, width)

    def encode(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Return one vector for each history [B, D]."""
        places = torch.arange(item_seq.size(1), dtype=torch.long, device=item_seq.device)
        places = self.position_embedding(places.unsqueeze(0).expand_as(item_seq))
        x = self.moe_adaptor(self.plm_embedding(item_seq)) + places
        if self.item_embedding is not None:
            x = x + self.item_embedding(item_seq)
        x = self.dropout(self.LayerNorm(x))
        return gather_indexes(self.trm_encoder(x, attention_mask(item_seq))[-1], item_seq_len - 1)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        user = self.encode(item_seq, item_seq_len)
        items = self.moe_adaptor(self.plm_embedding.weight)
        if self.item_embedding is not None:
            items = items + self.item_embedding.weight
        user, items = F.normalize(user, dim=-1), F.normalize(items, dim=-1)
        return torch.matmul(user, items.transpose(0, 1))


def _built(model: UniSRec) -> Built:
    # Histories of this library stand at the front, padding behind.
    ids = histories().flip(1)
    return model, (ids, lengths(ids)), {}


@entry("published_unisrec", FAMILY, tags=("frozen-table",))
def texts_alone(scale: Scale) -> Built:
    return _built(UniSRec(scale, ids=False))


@entry("published_unisrec_ids", FAMILY, tags=("frozen-table",))
def texts_and_ids(scale: Scale) -> Built:
    return _built(UniSRec(scale, ids=True))
