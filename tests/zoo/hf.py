"""transformers: a row names a class, its inputs and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

if TYPE_CHECKING:
    import torch

FAMILY = "transformers"
Inputs = Callable[[], dict[str, "torch.Tensor"]]

WIDTHS = frozenset(
    {
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "embedding_size",
        "dim",
        "n_heads",
        "hidden_dim",
        "n_embd",
        "n_head",
        "n_inner",
        "ffn_dim",
        "word_embed_proj_dim",
        "d_model",
        "d_ff",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "embed_dim",
        "conv_dim",
        "projection_dim",
        "time_step_rank",
        "state_size",
        "ssm_state_size",
        "mamba_d_state",
        "hidden_sizes",
        "pooler_hidden_size",
    }
)


@dataclass(frozen=True)
class Row:
    """One class of transformers with a small config; `rebuilds` is off where that is no truth."""

    name: str
    model: str
    inputs: Inputs
    config: Mapping[str, Any]
    rebuilds: bool = True
    tags: tuple[str, ...] = ()
    widths: frozenset[str] = field(default=WIDTHS)

    def make(self, scale: Scale) -> Built:
        """Builds the class from its config with every width scaled."""
        import transformers

        model = getattr(transformers, self.model)
        config = model.config_class(**scale.keys(self.config, self.widths))
        return model(config), (), self.inputs()


VOCABULARY = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = VOCABULARY | {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
}
DECODER = ENCODER | {"num_key_value_heads": 4, "head_dim": 8}
GPT = VOCABULARY | {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 40}
BART = VOCABULARY | {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
}
T5 = VOCABULARY | {
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 128,
    "num_heads": 8,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = {
    "text_config": ENCODER,
    "vision_config": VIT,
}
WAVE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
WAVE_WIDTHS = WIDTHS | {"num_conv_pos_embedding_groups"}

text = partial(given.text, mask=True)
ids = partial(given.text, mask=False)
uncached = partial(given.text, mask=False, use_cache=False)
seq2seq = given.seq2seq
image = partial(given.image, size=32)

LIST = (
    Row("bert", "BertModel", text, ENCODER),
    Row("roberta", "RobertaModel", text, ENCODER),
    Row(
        "distilbert",
        "DistilBertModel",
        text,
        VOCABULARY
        | {
            "dim": 64,
            "n_heads": 8,
            "hidden_dim": 128,
            "n_layers": 2,
            "max_position_embeddings": 40,
        },
    ),
    Row("albert", "AlbertModel", text, ENCODER | {"embedding_size": 32}),
    Row("electra", "ElectraModel", text, ENCODER | {"embedding_size": 32}),
    Row("mpnet", "MPNetModel", text, ENCODER),
    Row(
        "modernbert",
        "ModernBertModel",
        text,
        ENCODER
        | {
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    Row(
        "deberta_v2",
        "DebertaV2Model",
        text,
        ENCODER
        | {
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    Row("gpt2", "GPT2LMHeadModel", uncached, GPT),
    Row("gpt_neox", "GPTNeoXForCausalLM", uncached, ENCODER),
    Row(
        "opt",
        "OPTForCausalLM",
        uncached,
        ENCODER | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    Row(
        "bloom",
        "BloomForCausalLM",
        uncached,
        VOCABULARY | {"hidden_size": 64, "n_head": 8, "n_layer": 2},
    ),
    Row("llama_gqa", "LlamaForCausalLM", uncached, DECODER),
    Row("mistral", "MistralForCausalLM", uncached, DECODER | {"sliding_window": 4}),
    Row("qwen2", "Qwen2ForCausalLM", uncached, DECODER),
    Row("qwen3", "Qwen3ForCausalLM", uncached, DECODER),
    Row(
        "gemma2",
        "Gemma2ForCausalLM",
        uncached,
        DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    Row(
        "gemma3",
        "Gemma3ForCausalLM",
        uncached,
        DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    Row("phi3", "Phi3ForCausalLM", uncached, DECODER),
    Row(
        "mixtral",
        "MixtralForCausalLM",
        uncached,
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
        tags=("moe",),
    ),
    Row(
        "mamba",
        "MambaForCausalLM",
        uncached,
        VOCABULARY
        | {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
        tags=("scan",),
        widths=WIDTHS - {"state_size"},  # 16 from the smallest published Mamba to the largest
    ),
    Row("t5", "T5ForConditionalGeneration", seq2seq, T5, tags=("width-scalar",)),
    Row("bart", "BartModel", seq2seq, BART),
    Row(
        "whisper",
        "WhisperModel",
        given.speech2text,
        BART | {"num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 20},
    ),
    Row("vit", "ViTModel", image, VIT),
    Row("dinov2", "Dinov2Model", image, VIT),
    Row(
        "swin",
        "SwinModel",
        image,
        {
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [4, 8],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 4,
        },
    ),
    Row("clip", "CLIPModel", given.image_text, TOWERS | {"projection_dim": 32}),
    Row("siglip", "SiglipModel", given.image_text, TOWERS),
    Row("wav2vec2", "Wav2Vec2Model", given.wave, WAVE, widths=WAVE_WIDTHS),
)

for _row in LIST:
    entry(_row.name, FAMILY, rebuilds=_row.rebuilds, tags=_row.tags)(_row.make)
