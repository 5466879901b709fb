"""transformers, one line per architecture: the small config is found by the keys a class has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.zoo import inputs as given
from tests.zoo.hf import FAMILY, WIDTHS
from tests.zoo.registry import Built, Scale, entry

KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "text": partial(given.text, mask=True),
    "ids": partial(given.text, mask=False, use_cache=False),
    "seq2seq": given.seq2seq,
    "image": partial(given.image, size=32),
    "image64": partial(given.image, size=64),
    "image_text": given.image_text,
    "speech": given.speech2text,
    "wave": given.wave,
    "bands": given.bands,
    "series": given.series,
    "boxes": given.boxes,
    "canary": given.features,
    "video": given.video,
    "trajectory": given.trajectory,
}

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "decoder_start_token_id": 2,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_position_embeddings": 40,
    "n_positions": 40,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "emb_dim": 64,
    "embedding_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_heads": 8,
    "n_head": 8,
    "n_heads": 8,
    "attention_heads": 8,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    "intermediate_size": 128,
    "hidden_dim": 128,
    "d_ff": 128,
    "ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "num_mel_bins": 10,
    "max_source_positions": 12,
    "max_target_positions": 20,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WAVE = {
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MORE_WIDTHS = WIDTHS | {
    "emb_dim",
    "attention_heads",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "kv_lora_rank",
    "q_lora_rank",
    "num_conv_pos_embedding_groups",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mamba_n_heads",
    "mamba_d_ssm",
    "lru_width",
    "kv_channels",
    "dim_ff",
    "dff",
}


@dataclass(frozen=True)
class Wide:
    """A class of transformers, the kind of its inputs, and what its config needs beyond `SMALL`."""

    name: str
    model: str
    kind: str
    more: dict[str, Any] = field(default_factory=dict)
    rebuilds: bool = True
    tags: tuple[str, ...] = ()

    def make(self, scale: Scale) -> Built:
        """Builds the class from the smallest config that its keys allow."""
        import transformers

        model = getattr(transformers, self.model)
        config = small(model.config_class, scale, self.more)
        return model(config), (), KINDS[self.kind]()


def small(config_class: Any, scale: Scale, more: dict[str, Any]) -> Any:
    """Builds a config with every key of `SMALL` that the class has, its sub-configs alike."""
    default = config_class()
    config: dict[str, Any] = {
        key: value for key, value in SMALL.items() if _settable(default, key, value)
    }
    for key in getattr(config_class, "sub_configs", {}):
        part = getattr(default, key, None)
        if hasattr(part, "to_dict") and key not in more:
            config[key] = small(type(part), scale, {}).to_dict()
    config |= _layer_types(default) | {key: value for key, value in more.items()}
    parts = {key: config.pop(key) for key in list(config) if key in dict(default.sub_configs)}
    parts = {key: _part(default, key, part, scale) for key, part in parts.items()}
    return config_class(**scale.keys(config, MORE_WIDTHS), **parts)


def _part(default: Any, key: str, part: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """Completes a sub-config given by hand; one that `small` made is complete and scaled."""
    if "model_type" in part:
        return part
    return small(type(getattr(default, key)), scale, part).to_dict()


def _settable(default: Any, key: str, value: Any) -> bool:
    """Says whether the class has the key, as a plain attribute of the same kind."""
    if isinstance(getattr(type(default), key, None), property):
        return False
    held = vars(default).get(key, "absent")
    listed = isinstance(held, (list, tuple, dict))
    return held != "absent" and not (listed and not isinstance(value, (list, tuple)))


def _layer_types(default: Any) -> dict[str, Any]:
    """Keeps one layer of every type that the default config has, and at least two layers."""
    types = vars(default).get("layer_types")
    if not types:
        return {}
    kinds = list(dict.fromkeys(types))
    kept = kinds if len(kinds) > 1 else kinds * 2
    return {"layer_types": kept, "num_hidden_layers": len(kept)}


ROWS = (
    Wide("afmoe", "AfmoeForCausalLM", "ids"),
    Wide("apertus", "ApertusForCausalLM", "ids"),
    Wide("arcee", "ArceeForCausalLM", "ids"),
    Wide("bitnet", "BitNetForCausalLM", "ids"),
    Wide("biogpt", "BioGptForCausalLM", "ids"),
    Wide("codegen", "CodeGenForCausalLM", "ids"),
    Wide("cohere", "CohereForCausalLM", "ids"),
    Wide("cohere2", "Cohere2ForCausalLM", "ids"),
    Wide("ctrl", "CTRLLMHeadModel", "ids"),
    Wide("cwm", "CwmForCausalLM", "ids"),
    Wide("diffllama", "DiffLlamaForCausalLM", "ids"),
    Wide("doge", "DogeForCausalLM", "ids"),
    Wide("dots1", "Dots1ForCausalLM", "ids"),
    Wide("emu3", "Emu3ForCausalLM", "ids"),
    Wide("ernie4_5", "Ernie4_5ForCausalLM", "ids"),
    Wide("exaone4", "Exaone4ForCausalLM", "ids"),
    Wide("flex_olmo", "FlexOlmoForCausalLM", "ids"),
    Wide("flint", "FlintForCausalLM", "ids"),
    Wide("fuyu", "FuyuForCausalLM", "ids"),
    Wide("gemma", "GemmaForCausalLM", "ids"),
    Wide("glm", "GlmForCausalLM", "ids"),
    Wide("glm4", "Glm4ForCausalLM", "ids"),
    Wide("glm4_moe", "Glm4MoeForCausalLM", "ids"),
    Wide("gpt_bigcode", "GPTBigCodeForCausalLM", "ids"),
    Wide("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", "ids"),
    Wide("gpt_oss", "GptOssForCausalLM", "ids"),
    Wide("gptj", "GPTJForCausalLM", "ids"),
    Wide("granite", "GraniteForCausalLM", "ids"),
    Wide("granitemoe", "GraniteMoeForCausalLM", "ids"),
    Wide("granitemoeshared", "GraniteMoeSharedForCausalLM", "ids"),
    Wide("helium", "HeliumForCausalLM", "ids"),
    Wide("hrm", "HrmTextForCausalLM", "ids"),
    Wide("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "ids"),
    Wide("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "ids"),
    Wide("hy_v3", "HYV3ForCausalLM", "ids"),
    Wide("jais2", "Jais2ForCausalLM", "ids"),
    Wide("jetmoe", "JetMoeForCausalLM", "ids"),
    Wide("kolibri1", "Kolibri1ForCausalLM", "ids"),
    Wide("laguna", "LagunaForCausalLM", "ids"),
    Wide("lfm2", "Lfm2ForCausalLM", "ids"),
    Wide("llama4", "Llama4ForCausalLM", "ids"),
    Wide("mellum", "MellumForCausalLM", "ids"),
    Wide("mimo_v2_flash", "MiMoV2FlashForCausalLM", "ids"),
    Wide("minimax", "MiniMaxForCausalLM", "ids"),
    Wide("minimax_m2", "MiniMaxM2ForCausalLM", "ids"),
    Wide("ministral3", "Ministral3ForCausalLM", "ids"),
    Wide("moshi", "MoshiForCausalLM", "ids"),
    Wide("mpt", "MptForCausalLM", "ids"),
    Wide("nanochat", "NanoChatForCausalLM", "ids"),
    Wide("nemotron", "NemotronForCausalLM", "ids"),
    Wide("olmo", "OlmoForCausalLM", "ids"),
    Wide("olmo2", "Olmo2ForCausalLM", "ids"),
    Wide("olmo3", "Olmo3ForCausalLM", "ids"),
    Wide("olmo_hybrid", "OlmoHybridForCausalLM", "ids"),
    Wide("olmoe", "OlmoeForCausalLM", "ids"),
    Wide("openai_gpt", "OpenAIGPTLMHeadModel", "ids"),
    Wide("persimmon", "PersimmonForCausalLM", "ids"),
    Wide("phi", "PhiForCausalLM", "ids"),
    Wide("phimoe", "PhimoeForCausalLM", "ids"),
    Wide("qwen2_moe", "Qwen2MoeForCausalLM", "ids"),
    Wide("qwen3_moe", "Qwen3MoeForCausalLM", "ids"),
    Wide("qwen3_next", "Qwen3NextForCausalLM", "ids"),
    Wide("qwen3_5", "Qwen3_5ForCausalLM", "ids"),
    Wide("rwkv", "RwkvForCausalLM", "ids"),
    Wide("seed_oss", "SeedOssForCausalLM", "ids"),
    Wide("smollm3", "SmolLM3ForCausalLM", "ids"),
    Wide("solar_open", "SolarOpenForCausalLM", "ids"),
    Wide("stablelm", "StableLmForCausalLM", "ids"),
    Wide("starcoder2", "Starcoder2ForCausalLM", "ids"),
    Wide("vaultgemma", "VaultGemmaForCausalLM", "ids"),
    Wide("xglm", "XGLMForCausalLM", "ids"),
    Wide("modernbert_decoder", "ModernBertDecoderForCausalLM", "ids"),
    Wide("deepseek_v2", "DeepseekV2ForCausalLM", "ids"),
    Wide("deepseek_v3", "DeepseekV3ForCausalLM", "ids"),
    Wide("longcat_flash", "LongcatFlashForCausalLM", "ids"),
    Wide("minicpm3", "MiniCPM3ForCausalLM", "ids"),
    Wide("youtu", "YoutuForCausalLM", "ids"),
    Wide("falcon", "FalconForCausalLM", "ids"),
    Wide("falcon_mamba", "FalconMambaForCausalLM", "ids"),
    Wide("mamba2", "Mamba2ForCausalLM", "ids"),
    Wide("bamba", "BambaForCausalLM", "ids"),
    Wide("falcon_h1", "FalconH1ForCausalLM", "ids"),
    Wide("jamba", "JambaForCausalLM", "ids"),
    Wide("gpt_neo", "GPTNeoForCausalLM", "ids"),
    Wide("recurrent_gemma", "RecurrentGemmaForCausalLM", "ids"),
    Wide("zamba", "ZambaForCausalLM", "ids"),
    Wide("zamba2", "Zamba2ForCausalLM", "ids"),
    Wide("xlstm", "xLSTMForCausalLM", "ids"),
    Wide("dbrx", "DbrxForCausalLM", "ids"),
    Wide("gemma3n", "Gemma3nForCausalLM", "ids"),
    Wide("lfm2_moe", "Lfm2MoeForCausalLM", "ids"),
    Wide("nemotron_h", "NemotronHForCausalLM", "ids"),
    Wide("aria", "AriaTextForCausalLM", "ids"),
    Wide("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "ids"),
    Wide("granitemoehybrid", "GraniteMoeHybridForCausalLM", "ids"),
    Wide("kimi_linear", "KimiLinearForCausalLM", "ids"),
    Wide("inkling", "InklingForCausalLM", "ids"),
    Wide("hyperclovax", "HyperCLOVAXForCausalLM", "ids"),
    Wide("exaone_moe", "ExaoneMoeForCausalLM", "ids"),
    Wide("qwen3_5_moe", "Qwen3_5MoeForCausalLM", "ids"),
    Wide("deepseek_v4", "DeepseekV4ForCausalLM", "ids"),
    Wide("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "ids"),
    Wide("cpmant", "CpmAntForCausalLM", "ids"),
    Wide("bert_generation", "BertGenerationEncoder", "text"),
    Wide("big_bird", "BigBirdModel", "text"),
    Wide("camembert", "CamembertModel", "text"),
    Wide("canine", "CanineModel", "text"),
    Wide("convbert", "ConvBertModel", "text"),
    Wide("data2vec", "Data2VecTextModel", "text"),
    Wide("deberta", "DebertaModel", "text"),
    Wide("ernie", "ErnieModel", "text"),
    Wide("esm", "EsmModel", "text"),
    Wide("eurobert", "EuroBertModel", "text"),
    Wide("flaubert", "FlaubertModel", "text"),
    Wide("fnet", "FNetModel", "text"),
    Wide("funnel", "FunnelModel", "text"),
    Wide("gte", "GteModel", "text"),
    Wide("ibert", "IBertModel", "text"),
    Wide("jina_embeddings_v3", "JinaEmbeddingsV3Model", "text"),
    Wide("layoutlm", "LayoutLMModel", "text"),
    Wide("longformer", "LongformerModel", "text"),
    Wide("luke", "LukeModel", "text"),
    Wide("lxmert", "LxmertModel", "text"),
    Wide("markuplm", "MarkupLMModel", "text"),
    Wide("megatron_bert", "MegatronBertModel", "text"),
    Wide("mobilebert", "MobileBertModel", "text"),
    Wide("mra", "MraModel", "text"),
    Wide("nomic_bert", "NomicBertModel", "text"),
    Wide("nystromformer", "NystromformerModel", "text"),
    Wide("openai_privacy_filter", "OpenAIPrivacyFilterModel", "text"),
    Wide("rembert", "RemBertModel", "text"),
    Wide("roberta_prelayernorm", "RobertaPreLayerNormModel", "text"),
    Wide("roc_bert", "RoCBertModel", "text"),
    Wide("roformer", "RoFormerModel", "text"),
    Wide("splinter", "SplinterModel", "text"),
    Wide("squeezebert", "SqueezeBertModel", "text"),
    Wide("tapas", "TapasModel", "text"),
    Wide("ultrabert", "UltrabertModel", "text"),
    Wide("visual_bert", "VisualBertModel", "text"),
    Wide("xlm", "XLMModel", "text"),
    Wide("xlm_roberta", "XLMRobertaModel", "text"),
    Wide("xlm_roberta_xl", "XLMRobertaXLModel", "text"),
    Wide("xlnet", "XLNetModel", "text"),
    Wide("xmod", "XmodModel", "text"),
    Wide("yoso", "YosoModel", "text"),
    Wide("reformer", "ReformerModel", "text"),
    Wide("lilt", "LiltModel", "text"),
    Wide("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", "seq2seq"),
    Wide("blenderbot", "BlenderbotForConditionalGeneration", "seq2seq"),
    Wide("blenderbot_small", "BlenderbotSmallForConditionalGeneration", "seq2seq"),
    Wide("encoder_decoder", "EncoderDecoderModel", "seq2seq"),
    Wide("fsmt", "FSMTForConditionalGeneration", "seq2seq"),
    Wide("led", "LEDForConditionalGeneration", "seq2seq"),
    Wide("longt5", "LongT5ForConditionalGeneration", "seq2seq"),
    Wide("m2m_100", "M2M100ForConditionalGeneration", "seq2seq"),
    Wide("marian", "MarianMTModel", "seq2seq"),
    Wide("mbart", "MBartForConditionalGeneration", "seq2seq"),
    Wide("mt5", "MT5ForConditionalGeneration", "seq2seq"),
    Wide("mvp", "MvpForConditionalGeneration", "seq2seq"),
    Wide("nllb_moe", "NllbMoeForConditionalGeneration", "seq2seq"),
    Wide("pegasus", "PegasusForConditionalGeneration", "seq2seq"),
    Wide("pegasus_x", "PegasusXForConditionalGeneration", "seq2seq"),
    Wide("plbart", "PLBartForConditionalGeneration", "seq2seq"),
    Wide("prophetnet", "ProphetNetForConditionalGeneration", "seq2seq"),
    Wide("switch_transformers", "SwitchTransformersForConditionalGeneration", "seq2seq"),
    Wide("t5gemma", "T5GemmaForConditionalGeneration", "seq2seq"),
    Wide("umt5", "UMT5ForConditionalGeneration", "seq2seq"),
)

for _row in ROWS:
    entry(_row.name, FAMILY, rebuilds=_row.rebuilds, tags=_row.tags)(_row.make)
