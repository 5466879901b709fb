"""Transformers and their relatives over tokens and vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.inputs import normal, tokens
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide


class First(nn.Module):
    """A model, its first output alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)[0]


def _ids(model: nn.Module, length: int = 7) -> Built:
    return model, (tokens(length=length),), {}


def _vectors(model: nn.Module, width: int, length: int = 7) -> Built:
    return model, (normal(3, length, width),), {}


@wide("x-transformers", rebuilds=True)
def decoder(s: Scale) -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=s(32), depth=2, heads=s(4), attn_dim_head=8)
    return _ids(TransformerWrapper(num_tokens=97, max_seq_len=16, attn_layers=layers))


@wide("x-transformers", rebuilds=True)
def encoder(s: Scale) -> Built:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=s(32), depth=2, heads=s(4), attn_dim_head=8, ff_glu=True, use_rmsnorm=True)
    return _ids(TransformerWrapper(num_tokens=97, max_seq_len=16, attn_layers=layers))


@wide("x-transformers", rebuilds=True)
def rotary(s: Scale) -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=s(32), depth=2, heads=s(4), attn_dim_head=8, rotary_pos_emb=True, attn_kv_heads=s(2)
    )
    return _ids(TransformerWrapper(num_tokens=97, max_seq_len=16, attn_layers=layers))


@wide("x-transformers")  # slopes follow from how many heads there are: a slice keeps the large ones
def alibi(s: Scale) -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=s(32), depth=2, heads=s(4), attn_dim_head=8, alibi_pos_bias=True)
    return _ids(TransformerWrapper(num_tokens=97, max_seq_len=16, attn_layers=layers))


@wide("x-transformers")
def qk_norm(s: Scale) -> Built:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=s(32), depth=2, heads=s(4), attn_dim_head=8, attn_qk_norm=True)
    return _ids(TransformerWrapper(num_tokens=97, max_seq_len=16, attn_layers=layers))


@wide("x-transformers")
def vision(s: Scale) -> Built:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=s(32), depth=2, heads=s(4), attn_dim_head=8)
    model = ViTransformerWrapper(image_size=16, patch_size=4, num_classes=5, attn_layers=layers)
    return model, (normal(2, 3, 16, 16),), {}


@wide("x-transformers")
def cross_encoder(s: Scale) -> Built:
    from x_transformers import CrossAttender

    model = CrossAttender(dim=s(32), depth=2, heads=s(4), attn_dim_head=8)
    return model, (normal(3, 5, s(32)),), {"context": normal(3, 7, s(32))}


@wide("vector-quantize-pytorch")
def vq(s: Scale) -> Built:
    from vector_quantize_pytorch import VectorQuantize

    return _vectors(_Coded(s(32), VectorQuantize(dim=s(16), codebook_size=12)), s(32))


@wide("vector-quantize-pytorch")
def residual_vq(s: Scale) -> Built:
    from vector_quantize_pytorch import ResidualVQ

    quantizer = ResidualVQ(dim=s(16), codebook_size=12, num_quantizers=2)
    return _vectors(_Coded(s(32), quantizer), s(32))


@wide("vector-quantize-pytorch")
def fsq(s: Scale) -> Built:
    from vector_quantize_pytorch import FSQ

    return _vectors(_Coded(s(32), FSQ([5, 3, 3], dim=s(16))), s(32))


@wide("vector-quantize-pytorch")
def lookup_free(s: Scale) -> Built:
    from vector_quantize_pytorch import LFQ

    return _vectors(_Coded(s(32), LFQ(codebook_size=16, dim=s(16))), s(32))


class _Coded(nn.Module):
    """An encoder and a decoder around a quantizer."""

    def __init__(self, width: int, quantizer: nn.Module) -> None:
        super().__init__()
        self.encode, self.quantize = nn.Linear(width, width // 2), quantizer
        self.decode = nn.Linear(width // 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.quantize(self.encode(x))[0])


@wide("performer-pytorch")
def performer(s: Scale) -> Built:
    from performer_pytorch import PerformerLM

    model = PerformerLM(
        num_tokens=97,
        max_seq_len=16,
        dim=s(32),
        depth=2,
        heads=s(4),
        dim_head=8,
        causal=False,
        nb_features=12,
    )
    return _ids(model)


@wide("perceiver-pytorch")
def perceiver(s: Scale) -> Built:
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        input_channels=3,
        input_axis=2,
        num_freq_bands=2,
        max_freq=4.0,
        depth=2,
        num_latents=6,
        latent_dim=s(32),
        cross_heads=1,
        latent_heads=s(4),
        cross_dim_head=8,
        latent_dim_head=8,
        num_classes=5,
    )
    return model, (normal(2, 8, 8, 3),), {}


@wide("perceiver-pytorch")
def perceiver_io(s: Scale) -> Built:
    from perceiver_pytorch import PerceiverIO

    model = PerceiverIO(
        dim=s(16),
        queries_dim=s(16),
        logits_dim=5,
        depth=2,
        num_latents=6,
        latent_dim=s(32),
        latent_heads=s(4),
        cross_dim_head=8,
        latent_dim_head=8,
    )
    return model, (normal(2, 7, s(16)),), {"queries": normal(3, s(16))}


@wide("linear-attention-transformer")
def linear_attention(s: Scale) -> Built:
    from linear_attention_transformer import LinearAttentionTransformerLM

    return _ids(
        LinearAttentionTransformerLM(
            num_tokens=97, dim=s(32), heads=s(4), depth=2, max_seq_len=16, causal=False
        )
    )


@wide("linformer")
def linformer(s: Scale) -> Built:
    from linformer import LinformerLM

    return _ids(LinformerLM(num_tokens=97, dim=s(32), seq_len=8, depth=2, heads=s(4), k=4), 8)


@wide("nystrom-attention")
def nystromformer(s: Scale) -> Built:
    from nystrom_attention import Nystromformer

    model = Nystromformer(dim=s(32), dim_head=8, heads=s(4), depth=2, num_landmarks=4)
    return _vectors(model, s(32), 8)


@wide("reformer-pytorch", "random")
def reformer(s: Scale) -> Built:
    from reformer_pytorch import ReformerLM

    return _ids(
        ReformerLM(
            num_tokens=97, dim=s(32), depth=1, max_seq_len=16, heads=s(4), bucket_size=4, n_hashes=2
        ),
        8,
    )


@wide("routing-transformer")
def routing(s: Scale) -> Built:
    from routing_transformer import RoutingTransformerLM

    model = RoutingTransformerLM(
        num_tokens=97,
        dim=s(32),
        heads=s(4),
        depth=1,
        max_seq_len=16,
        window_size=4,
        n_local_attn_heads=s(2),
    )
    return _ids(model, 16)


@wide("memorizing-transformers-pytorch")
def memorizing_attention(s: Scale) -> Built:
    from memorizing_transformers_pytorch.memorizing_transformers_pytorch import Attention

    return _vectors(First(Attention(dim=s(32), heads=s(4), dim_head=8)), s(32))


@wide("mambapy", rebuilds=True)
def mamba(s: Scale) -> Built:
    from mambapy.mamba import Mamba, MambaConfig

    return _vectors(Mamba(MambaConfig(d_model=s(32), n_layers=2, d_state=4, dt_rank=s(4))), s(32))


@wide("mambapy")
def mamba_sequential(s: Scale) -> Built:
    from mambapy.mamba import Mamba, MambaConfig

    config = MambaConfig(d_model=s(32), n_layers=1, d_state=4, dt_rank=s(4), pscan=False)
    return _vectors(Mamba(config), s(32))


@wide("minGRU-pytorch")
def min_gru(s: Scale) -> Built:
    from minGRU_pytorch import minGRU

    return _vectors(nn.Sequential(minGRU(s(32)), nn.LayerNorm(s(32)), minGRU(s(32))), s(32))


@wide("xlstm")
def xlstm(s: Scale) -> Built:
    from xlstm import (
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        xLSTMBlockStack,
        xLSTMBlockStackConfig,
    )

    block = mLSTMBlockConfig(
        mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
    )
    config = xLSTMBlockStackConfig(
        mlstm_block=block, context_length=8, num_blocks=2, embedding_dim=s(32)
    )
    return _vectors(xLSTMBlockStack(config), s(32), 8)


@wide("torchscale", rebuilds=True)
def retnet(s: Scale) -> Built:
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(
        decoder_embed_dim=s(32),
        decoder_value_embed_dim=s(64),
        decoder_retention_heads=s(4),
        decoder_ffn_embed_dim=s(64),
        decoder_layers=2,
        vocab_size=97,
    )
    return _ids(First(RetNetDecoder(config, embed_tokens=nn.Embedding(97, s(32)))))


@wide("torchscale")
def torchscale_encoder(s: Scale) -> Built:
    from torchscale.architecture.config import EncoderConfig
    from torchscale.architecture.encoder import Encoder

    config = EncoderConfig(
        encoder_embed_dim=s(32),
        encoder_attention_heads=s(4),
        encoder_ffn_embed_dim=s(64),
        encoder_layers=2,
        vocab_size=97,
        no_output_layer=True,
    )
    model = Encoder(config, embed_tokens=nn.Embedding(97, s(32)))
    return model, (tokens(),), {}


@wide("slot-attention", "random")
def slots(s: Scale) -> Built:
    from slot_attention import SlotAttention

    return _vectors(SlotAttention(num_slots=3, dim=s(32), iters=2), s(32))


@wide("local-attention")
def local(s: Scale) -> Built:
    from local_attention import LocalTransformer

    model = LocalTransformer(
        num_tokens=97,
        dim=s(32),
        depth=2,
        max_seq_len=16,
        local_attn_window_size=4,
        dim_head=8,
        heads=s(4),
        causal=True,
    )
    return _ids(model, 8)


@wide("g-mlp-pytorch")
def g_mlp(s: Scale) -> Built:
    from g_mlp_pytorch import gMLP

    return _ids(gMLP(num_tokens=97, dim=s(32), depth=2, seq_len=7, causal=True))


@wide("titans-pytorch")
def titans(s: Scale) -> Built:
    from titans_pytorch import MemoryAsContextTransformer

    model = MemoryAsContextTransformer(
        num_tokens=97,
        dim=s(32),
        depth=2,
        segment_len=8,
        heads=s(4),
        dim_head=8,
        neural_memory_layers=(),
    )
    return _ids(model, 8)


@wide("axial-attention")
def axial(s: Scale) -> Built:
    from axial_attention import AxialAttention

    return (
        AxialAttention(dim=s(32), dim_index=1, heads=s(4), num_dimensions=2),
        (normal(2, s(32), 5, 6),),
        {},
    )


@wide("torch", rebuilds=True)
def seq2seq_transformer(s: Scale) -> Built:
    model = nn.Transformer(s(32), s(4), 1, 1, s(64), batch_first=True)
    return model, (normal(3, 7, s(32)), normal(3, 5, s(32))), {}
