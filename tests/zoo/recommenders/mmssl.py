"""MMSSL (Wei et al., WWW 2023): graphs of users and items carry ids, pictures and texts.

The graphs are arguments of the forward, as in the authors' code.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import normal
from tests.zoo.recommenders.histories import FAMILY
from tests.zoo.registry import Built, Scale, entry

USERS, ITEMS, IMAGE, TEXT = 13, 17, 24, 40
ID_RATE, MODEL_RATE = 0.36, 0.55


class MMSSL(nn.Module):
    """Vectors of all users and items, and those of each modality."""

    def __init__(self, width: int, heads: int, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.layers = heads, layers
        self.image_trans, self.text_trans = nn.Linear(IMAGE, width), nn.Linear(TEXT, width)
        self.encoder = nn.ModuleDict(
            {"image_encoder": self.image_trans, "text_encoder": self.text_trans}
        )
        self.common_trans = nn.Linear(width, width)
        self.align = nn.ModuleDict({"common_trans": self.common_trans})
        self.user_id_embedding = nn.Embedding(USERS, width)
        self.item_id_embedding = nn.Embedding(ITEMS, width)
        self.image_feats, self.text_feats = normal(ITEMS, IMAGE), normal(ITEMS, TEXT)
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.2)
        square = ("w_q", "w_k", "w_v", "w_self_attention_item", "w_self_attention_user")
        weights = {name: nn.Parameter(torch.randn(width, width) / width**0.5) for name in square}
        joined = torch.randn(heads * width, width) / (heads * width) ** 0.5
        self.weight_dict = nn.ParameterDict(weights | {"w_self_attention_cat": joined})

    def attention(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Mix the views of each node; every head weighs whole vectors [views, N, D]."""
        value = torch.stack(views)
        count, nodes, width = value.shape
        query = torch.matmul(value, self.weight_dict["w_q"])
        query = query.reshape(count, nodes, self.heads, width // self.heads).permute(2, 0, 1, 3)
        # The keys are the queries once more: the authors' line reads Q where K was meant.
        key = query
        weights = query.unsqueeze(2) * key.unsqueeze(1) / (width / self.heads) ** 0.5
        weights = F.softmax(weights.sum(-1).unsqueeze(-1), dim=2)
        mixed = (weights * value.unsqueeze(0).unsqueeze(0)).sum(2)
        every_head = torch.cat(list(mixed), -1)
        return torch.matmul(every_head, self.weight_dict["w_self_attention_cat"])

    def propagate(
        self, users: torch.Tensor, items: torch.Tensor, ui: torch.Tensor, iu: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over the hops; the last hop ends in a softmax over the units."""
        every_user, every_item = [users], [items]
        for i in range(self.layers):
            last = self.softmax if i == self.layers - 1 else nn.Identity()
            users = last(torch.mm(ui, items))
            items = last(torch.mm(iu, users))
            every_user.append(users)
            every_item.append(items)
        return torch.mean(torch.stack(every_user), dim=0), torch.mean(torch.stack(every_item), 0)

    def forward(
        self, ui: torch.Tensor, iu: torch.Tensor, image_ui: torch.Tensor, text_ui: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        image = self.dropout(self.image_trans(self.image_feats))
        text = self.dropout(self.text_trans(self.text_feats))
        image_users, text_users = torch.mm(ui, image), torch.mm(ui, text)
        image_items, text_items = torch.mm(iu, image_users), torch.mm(iu, text_users)
        items, users = self.item_id_embedding.weight, self.user_id_embedding.weight
        user_views = [torch.mm(g, items) for g in (image_ui, text_ui)]
        item_views = [torch.mm(g.t(), users) for g in (image_ui, text_ui)]
        users = users + ID_RATE * F.normalize(self.attention(user_views).mean(0), p=2, dim=1)
        items = items + ID_RATE * F.normalize(self.attention(item_views).mean(0), p=2, dim=1)
        users, items = self.propagate(users, items, ui, iu)
        for user_part, item_part in ((image_users, image_items), (text_users, text_items)):
            users = users + MODEL_RATE * F.normalize(user_part, p=2, dim=1)
            items = items + MODEL_RATE * F.normalize(item_part, p=2, dim=1)
        return users, items, image_items, text_items, image_users, text_users


def graph(seed: int) -> torch.Tensor:
    """Draw a row-normalised graph of users and items [USERS, ITEMS]."""
    draw = torch.Generator().manual_seed(seed)
    edges = (torch.rand(USERS, ITEMS, generator=draw) < 0.3).float()
    return edges / edges.sum(1, keepdim=True).clamp(min=1)


@entry("published_mmssl", FAMILY, tags=("parameters-alone",))
def mmssl(scale: Scale) -> Built:
    ui = graph(0)
    graphs = (ui, ui.t().contiguous(), graph(1), graph(2))
    return MMSSL(scale(32), 4), graphs, {}  # the heads are a list in the forward: they stay
