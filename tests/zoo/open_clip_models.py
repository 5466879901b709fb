"""open_clip: both towers, built from config dataclasses."""

from __future__ import annotations

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "open_clip"


@entry("open_clip", FAMILY)
def clip(scale: Scale) -> Built:
    """CLIP with both towers; the embeddings leave normalised."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model = CLIP(
        embed_dim=scale(32),
        vision_cfg=CLIPVisionCfg(
            layers=2, width=scale(64), head_width=8, patch_size=8, image_size=32
        ),
        text_cfg=CLIPTextCfg(
            context_length=7, vocab_size=97, width=scale(64), heads=scale(8), layers=2
        ),
    )
    return model, (given.pixels(32), given.tokens()), {}
