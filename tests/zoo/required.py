"""The architectures that must pass: both nestings, shrinking to half, with a small tail."""

from __future__ import annotations

TRANSFORMERS = """
    bert roberta distilbert albert electra mpnet modernbert deberta_v2 gpt2 gpt_neox opt bloom
    llama_gqa
    mistral qwen2 qwen3 gemma2 gemma3 phi3 mixtral mamba t5 bart whisper vit dinov2 swin clip
    siglip wav2vec2
    """.split()
VISION = """
    timm_vit timm_deit timm_swin timm_convnext timm_mixer timm_resnet timm_resnext timm_efficientnet
    timm_mobilenetv3 timm_densenet timm_regnet timm_maxvit timm_poolformer timm_nfnet timm_hrnet
    """.split()
TORCH = """
    open_clip nn_transformer_encoder nn_multihead_attention nn_lstm nn_gru
    """.split()
RECOMMENDERS = """
    sasrec lru_real lru_complex dlrm dcn deepfm two_tower fmlp_rec lightgcn plain_attribute
    uncopyable branching
    """.split()

REQUIRED = (*TRANSFORMERS, *VISION, *TORCH, *RECOMMENDERS)
