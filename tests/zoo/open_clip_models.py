"""open_clip: both towers, built from config dataclasses."""

from __future__ import annotations

from typing import Any

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "open_clip"


def _vision(scale: Scale, **more: Any) -> dict[str, Any]:
    small = {"layers": 2, "width": scale(64), "head_width": 8, "patch_size": 8, "image_size": 32}
    return small | more


def _text(scale: Scale, **more: Any) -> dict[str, Any]:
    small = {"context_length": 7, "vocab_size": 97, "width": scale(64), "heads": scale(8)}
    return small | {"layers": 2} | more


def _clip(
    name: str, scale: Scale, vision: dict[str, Any], text: dict[str, Any], **more: Any
) -> Built:
    from open_clip import model as library

    model = getattr(library, name)(
        embed_dim=scale(32),
        vision_cfg=library.CLIPVisionCfg(**vision),
        text_cfg=library.CLIPTextCfg(**text),
        **more,
    )
    return (
        model,
        (given.pixels(vision["image_size"]), given.tokens(length=text["context_length"])),
        {},
    )


@entry("open_clip", FAMILY)
def clip(scale: Scale) -> Built:
    """CLIP with both towers; the embeddings leave normalised."""
    return _clip("CLIP", scale, _vision(scale), _text(scale))


@entry("open_clip_quick", FAMILY)
def quick(scale: Scale) -> Built:
    """CLIP with quick GELU, average pooling and layer scale."""
    vision = _vision(scale, pool_type="avg", ls_init_value=0.1)
    return _clip("CLIP", scale, vision, _text(scale, ls_init_value=0.1), quick_gelu=True)


@entry("open_clip_custom", FAMILY)
def custom(scale: Scale) -> Built:
    """CLIP whose text tower is a module of its own and whose vision tower pools by attention."""
    vision = _vision(
        scale, attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=scale(8)
    )
    text = _text(scale, embed_cls=True, pad_id=0, no_causal_mask=True, proj_bias=True)
    text["context_length"] = 7
    return _clip("CustomTextCLIP", scale, vision, text | {"pool_type": "last"})


@entry("open_clip_custom_block", FAMILY)
def custom_block(scale: Scale) -> Built:
    """CLIP with custom residual blocks: norms inside attention and feed-forward."""
    extra = {"block_type": "custom", "qk_norm": True, "scale_attn": True, "scale_fc": True}
    text = _text(scale, block_type="custom", qk_norm=True, scale_attn_inner=True)
    return _clip("CLIP", scale, _vision(scale, **extra), text)


@entry("open_clip_siglip", FAMILY)
def siglip(scale: Scale) -> Built:
    """SigLIP: average pooling without a first norm, a bias beside the temperature."""
    vision = _vision(scale, no_ln_pre=True, pool_type="avg")
    text = _text(scale, no_causal_mask=True, proj_bias=True, pool_type="last")
    return _clip("CustomTextCLIP", scale, vision, text, init_logit_bias=-10.0)


@entry("open_clip_resnet", FAMILY, rebuilds=False)
def resnet(scale: Scale) -> Built:
    """CLIP with a modified ResNet and attention pooling."""
    return _clip(
        "CLIP", scale, _vision(scale, layers=(1, 1, 1, 1), width=16, image_size=64), _text(scale)
    )


@entry("open_clip_convnext", FAMILY, rebuilds=False)
def convnext(scale: Scale) -> Built:
    """CLIP with a ConvNeXt of timm as its vision tower."""
    vision = _vision(scale, timm_model_name="convnext_atto", timm_pool="", image_size=64)
    return _clip("CLIP", scale, vision, _text(scale))


@entry("open_clip_coca", FAMILY)
def coca(scale: Scale) -> Built:
    """CoCa: a text decoder that attends to pooled image tokens."""
    from open_clip.coca_model import CoCa, MultimodalCfg

    model = CoCa(
        embed_dim=scale(64),
        multimodal_cfg=MultimodalCfg(**_text(scale, context_length=6), attn_pooler_heads=scale(8)),
        text_cfg=_cfg(
            "CLIPTextCfg", _text(scale, context_length=6, embed_cls=True, output_tokens=True)
        ),
        vision_cfg=_cfg(
            "CLIPVisionCfg",
            _vision(
                scale,
                attentional_pool=True,
                attn_pooler_queries=5,
                attn_pooler_heads=scale(8),
                output_tokens=True,
            ),
        ),
    )
    return model, (given.pixels(32), given.tokens(batch=2, length=6)), {}


def _cfg(name: str, values: dict[str, Any]) -> Any:
    from open_clip import model as library

    return getattr(library, name)(**values)
