"""timm: a row names a registered model and the keyword arguments that make it small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "timm"
WIDTHS = frozenset("embed_dim embed_dims num_heads dims growth_rate hidden_dim".split())


@dataclass(frozen=True)
class Row:
    """A model of timm at `size` x `size` pixels; it rebuilds where a keyword is a width."""

    name: str
    model: str
    config: Mapping[str, Any]
    size: int = 32
    tags: tuple[str, ...] = ()

    @property
    def rebuilds(self) -> bool:
        return not WIDTHS.isdisjoint(self.config)

    def make(self, scale: Scale) -> Built:
        """Builds the model with every width scaled."""
        import timm

        config = {"num_classes": 10} | scale.keys(self.config, WIDTHS)
        return timm.create_model(self.model, **config), (given.pixels(self.size),), {}


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 8}
SWIN = {"img_size": 32, "window_size": 4, "patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (4, 8)}
STAGES = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}

LIST = (
    Row("timm_vit", "vit_tiny_patch16_224", VIT),
    Row("timm_deit", "deit_tiny_distilled_patch16_224", VIT),
    Row("timm_swin", "swin_tiny_patch4_window7_224", SWIN),
    Row("timm_convnext", "convnext_atto", STAGES, 64),
    Row(
        "timm_mixer",
        "mixer_s32_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_blocks": 2},
    ),
    Row("timm_resnet", "resnet18", {}, 64),
    Row("timm_resnext", "resnext50_32x4d", {"layers": (1, 1, 1, 1)}, 64),
    Row("timm_efficientnet", "efficientnet_b0", {}, 64),
    Row("timm_mobilenetv3", "mobilenetv3_small_050", {}, 64),
    Row("timm_densenet", "densenet121", {"growth_rate": 8, "block_config": (2, 2, 2)}, 64),
    Row("timm_regnet", "regnety_002", {}, 64),
    Row("timm_poolformer", "poolformer_s12", STAGES, 64),
    Row("timm_nfnet", "dm_nfnet_f0", {"depths": (1, 1, 1, 1), "channels": (32, 64, 96, 96)}, 64),
    Row("timm_hrnet", "hrnet_w18_small", {}, 64),
)

for _row in LIST:
    entry(_row.name, FAMILY, rebuilds=_row.rebuilds, tags=_row.tags)(_row.make)


@entry("timm_maxvit", FAMILY)
def maxvit(scale: Scale) -> Built:
    """MaxViT with whole heads of 8 and windows of 2."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    widths = scale.each((32, 64))
    transformer = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4))
    config = MaxxVitCfg(
        embed_dim=tuple(widths),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=scale(32),
        transformer_cfg=transformer,
    )
    return MaxxVit(config, img_size=32, num_classes=10), (given.pixels(32),), {}
