"""VIP5 (Geng et al., EMNLP Findings 2023): T5 with visual tokens and adapters.

Places of category 1 among the tokens are filled with projected picture features. The authors fill
them row by row with indices that depend on the values; here one masked_scatter does the same.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.inputs import normal, padded, tokens
from tests.zoo.recommenders.histories import FAMILY
from tests.zoo.registry import Built, Scale, entry

VOCABULARY, FEATURES, VISUAL_TOKENS, HEAD, BUCKETS = 97, 24, 2, 8, 8


class T5LayerNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(spread + self.eps))


class AdapterController(nn.Module):
    """A bottleneck beside the identity, one for each task; here one task."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        sampler = {"down_sampler": nn.Linear(width, inner), "up_sampler": nn.Linear(inner, width)}
        self.adapters = nn.ModuleDict({"sequential": nn.ModuleDict(sampler)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = self.adapters["sequential"]
        return adapter["up_sampler"](F.gelu(adapter["down_sampler"](x))) + x


class T5Attention(nn.Module):
    """Unscaled heads with a relative bias that the first layer owns."""

    def __init__(self, heads: int, width: int, *, biased: bool) -> None:
        super().__init__()
        self.n_heads, inner = heads, heads * HEAD
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.n_heads, HEAD).transpose(1, 2)

    def bias(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the bias of every pair of positions [1, H, L, L]."""
        place = torch.arange(length, device=device)
        bucket = (place[None, :] - place[:, None]).clamp(-3, 4) + 3
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)

    def forward(self, x: torch.Tensor, other: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        query, key, value = self._heads(self.q(x)), self._heads(self.k(other)), self.v(other)
        scores = torch.matmul(query, key.transpose(3, 2))
        scores += bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        mixed = torch.matmul(weights, self._heads(value)).transpose(1, 2).contiguous()
        return self.o(mixed.view(x.shape[0], -1, self.n_heads * HEAD))


class T5LayerAttention(nn.Module):
    """Norm, attention (to itself or to the encoder), adapter, residual."""

    def __init__(self, heads: int, width: int, *, kind: str, biased: bool) -> None:
        super().__init__()
        self.kind = kind
        self.add_module(kind, T5Attention(heads, width, biased=biased))
        self.layer_norm, self.dropout = T5LayerNorm(width), nn.Dropout(0.1)
        self.attn_adapter = AdapterController(width, max(1, width // 4))

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, encoded: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed = self.layer_norm(x)
        mixed = self.get_submodule(self.kind)(normed, normed if encoded is None else encoded, bias)
        return x + self.dropout(self.attn_adapter(mixed))


class T5LayerFF(nn.Module):
    """Norm, two linears, adapter, residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        linears = {
            "wi": nn.Linear(width, inner, bias=False),
            "wo": nn.Linear(inner, width, bias=False),
        }
        self.DenseReluDense = nn.ModuleDict(linears)
        self.layer_norm, self.dropout = T5LayerNorm(width), nn.Dropout(0.1)
        self.ff_adapter = AdapterController(width, max(1, width // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.DenseReluDense["wi"](self.layer_norm(x)).relu()
        return x + self.dropout(self.ff_adapter(self.DenseReluDense["wo"](hidden)))


def block(scale: Scale, *, decoder: bool, first: bool) -> nn.ModuleDict:
    """Return one block: attention to itself, perhaps to the encoder, feed-forward."""
    heads, width = scale(4), scale(32)
    layers: list[nn.Module] = [T5LayerAttention(heads, width, kind="SelfAttention", biased=first)]
    if decoder:
        layers.append(T5LayerAttention(heads, width, kind="EncDecAttention", biased=False))
    return nn.ModuleDict({"layer": nn.ModuleList([*layers, T5LayerFF(width, scale(64))])})


class VisualEmbedding(nn.Module):
    """Picture features become tokens [B, V, F] -> [B, V n, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = width * VISUAL_TOKENS
        tower = nn.Sequential(nn.Linear(FEATURES, wide // 2), nn.Tanh(), nn.Linear(wide // 2, wide))
        self.feat_embedding = nn.Sequential(nn.ModuleDict({"model": tower}), T5LayerNorm(wide))
        self.width = width

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        x = self.feat_embedding[1](self.feat_embedding[0]["model"](feats))
        return x.reshape(feats.shape[0], feats.shape[1] * VISUAL_TOKENS, self.width)


class JointEncoder(nn.Module):
    """Tokens with pictures among them, whole words and categories added."""

    def __init__(self, scale: Scale, shared: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = shared
        self.block = nn.ModuleList(block(scale, decoder=False, first=i == 0) for i in range(2))
        self.final_layer_norm, self.dropout = T5LayerNorm(scale(32)), nn.Dropout(0.1)
        self.whole_word_embeddings = nn.Embedding(32, scale(32))
        self.category_embeddings = nn.Embedding(16, scale(32))
        self.visual_embedding = VisualEmbedding(scale(32))

    def forward(
        self,
        ids: torch.Tensor,
        words: torch.Tensor,
        categories: torch.Tensor,
        feats: torch.Tensor,
    ) -> torch.Tensor:
        pictured = (categories == 1).unsqueeze(-1)
        x = self.embed_tokens(ids).masked_scatter(pictured, self.visual_embedding(feats))
        x = x + self.whole_word_embeddings(words) + self.category_embeddings(categories)
        bias = self.block[0]["layer"][0].SelfAttention.bias(ids.shape[1], ids.device)
        bias = bias + torch.where(ids.ne(0), 0.0, -1e9)[:, None, None, :]
        x = self.dropout(x)
        for item in self.block:
            x = item["layer"][1](item["layer"][0](x, bias))
        return self.dropout(self.final_layer_norm(x))


class Decoder(nn.Module):
    """The stack that attends to the encoder."""

    def __init__(self, scale: Scale, shared: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = shared
        self.block = nn.ModuleList(block(scale, decoder=True, first=i == 0) for i in range(2))
        self.final_layer_norm, self.dropout = T5LayerNorm(scale(32)), nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, encoded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, length = self.embed_tokens(ids), ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        bias = self.block[0]["layer"][0].SelfAttention.bias(length, ids.device)
        bias = bias.masked_fill(future, -1e9)
        seen = torch.where(mask, 0.0, -1e9)[:, None, None, :]
        for item in self.block:
            itself, cross, forward = item["layer"]
            x = forward(cross(itself(x, bias), seen, encoded))
        return self.dropout(self.final_layer_norm(x))


class VIP5(nn.Module):
    """Scores of the next token, by the shared table at width ** -0.5."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, scale(32))
        self.encoder, self.decoder = JointEncoder(scale, self.shared), Decoder(scale, self.shared)
        self.lm_head = nn.Linear(scale(32), VOCABULARY, bias=False)
        self.lm_head.weight = self.shared.weight
        self.model_dim = scale(32)

    def forward(
        self,
        input_ids: torch.Tensor,
        whole_word_ids: torch.Tensor,
        category_ids: torch.Tensor,
        vis_feats: torch.Tensor,
        decoder_input_ids: torch.Tensor,
    ) -> torch.Tensor:
        encoded = self.encoder(input_ids, whole_word_ids, category_ids, vis_feats)
        x = self.decoder(decoder_input_ids, encoded, input_ids.ne(0))
        return self.lm_head(x * self.model_dim**-0.5)


@entry("published_vip5", FAMILY, tags=("width-scalar", "writes"))
def vip5(scale: Scale) -> Built:
    ids = tokens() * padded()
    categories = torch.zeros_like(ids)
    categories[:, 1:5] = 1  # two pictures of two tokens each
    given = (ids, ids % 11, categories, normal(ids.shape[0], 2, FEATURES), tokens(length=5))
    return VIP5(scale), given, {}
