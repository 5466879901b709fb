"""timm: a row names a registered model and the keyword arguments that make it small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
    Row("timm_resnet", "resnet18", {"channels": (32, 48, 64, 96)}, 64),
    Row("timm_densenet", "densenet121", {"growth_rate": 8, "block_config": (2, 2, 2)}, 64),
    Row("timm_regnet", "regnety_002", {}, 64),
)

for _row in LIST:
    entry(_row.name, FAMILY, rebuilds=_row.rebuilds, tags=_row.tags)(_row.make)


@entry("timm_mixer", FAMILY)
def mixer(scale: Scale) -> Built:
    """MLP-Mixer: the hidden axis of the token mixing is a width too, half the embedding."""
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(
        img_size=32, patch_size=8, embed_dim=scale(64), num_blocks=2, num_classes=10
    )
    return model, (given.pixels(32),), {}


@entry("timm_resnext", FAMILY)
def resnext(scale: Scale) -> Built:
    """ResNeXt: the number of groups shrinks, the width of a group stays."""
    from timm.models.resnet import Bottleneck, ResNet

    model = ResNet(
        Bottleneck,
        (1, 1, 1, 1),
        channels=tuple(scale.each((16, 32, 48, 64))),
        cardinality=scale(8),
        base_width=int(16 / scale.ratio),
        stem_width=scale(8),
        stem_type="deep",
        num_classes=10,
    )
    return model, (given.pixels(64),), {}


@entry("timm_resnet_d", FAMILY)
def resnet_d(scale: Scale) -> Built:
    """ResNet-D: bottlenecks, a deep stem and average-pooled shortcuts."""
    from timm.models.resnet import Bottleneck, ResNet

    model = ResNet(
        Bottleneck,
        (1, 2, 1, 1),
        channels=tuple(scale.each((16, 32, 48, 64))),
        stem_width=scale(8),
        stem_type="deep",
        avg_down=True,
        num_classes=10,
    )
    return model, (given.pixels(64),), {}


def _mobile(scale: Scale, arch: list[list[str]], **more: Any) -> Built:
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    model = EfficientNet(
        decode_arch_def(arch),
        num_classes=10,
        num_features=scale(96),
        stem_size=16,
        round_chs_fn=partial(round_channels, multiplier=scale.ratio, divisor=1),
        **more,
    )
    return model, (given.pixels(64),), {}


@entry("timm_efficientnet", FAMILY)
def efficientnet(scale: Scale) -> Built:
    """EfficientNet: inverted residuals with squeeze-and-excitation."""
    from torch.nn import SiLU

    arch = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k3_s2_e6_c32_se0.25"], ["ir_r2_k5_s2_e6_c48_se0.25"]]
    return _mobile(scale, arch, act_layer=SiLU)


@entry("timm_mobilenetv3", FAMILY)
def mobilenetv3(scale: Scale) -> Built:
    """MobileNetV3: hard swish, hard sigmoid gates and a head after the pooling."""
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.mobilenetv3 import MobileNetV3
    from torch.nn import Hardswish

    arch = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r2_k3_s2_e4_c32"], ["ir_r2_k5_s2_e4_c48_se0.25"], ["cn_r1_k1_s1_c96"]]
    model = MobileNetV3(
        decode_arch_def(arch),
        num_classes=10,
        num_features=scale(128),
        stem_size=16,
        act_layer=Hardswish,
        round_chs_fn=partial(round_channels, multiplier=scale.ratio, divisor=1),
    )
    return model, (given.pixels(64),), {}


@entry("timm_poolformer", FAMILY)
def poolformer(scale: Scale) -> Built:
    """PoolFormer: attention replaced by average pooling."""
    from timm.layers import GroupNorm1
    from timm.models.metaformer import MetaFormer

    model = MetaFormer(
        depths=(1, 1, 2, 1),
        dims=tuple(scale.each((16, 32, 48, 64))),
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        use_mlp_head=False,
        num_classes=10,
    )
    return model, (given.pixels(64),), {}


@entry("timm_nfnet", FAMILY, rebuilds=False)
def nfnet(scale: Scale) -> Built:
    """NFNet: weight standardisation, no norm, squeeze-and-excitation."""
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(
        depths=(1, 1, 1, 1),
        channels=(32, 64, 96, 96),
        stem_type="deep_quad",
        group_size=8,
        bottle_ratio=0.5,
        extra_conv=True,
        num_features=128,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
        act_layer="gelu",
    )
    return NormFreeNet(config, num_classes=10), (given.pixels(64),), {}


@entry("timm_hrnet", FAMILY, rebuilds=False)
def hrnet(scale: Scale) -> Built:
    """HRNet: four resolutions in parallel, fused by sums after each stage."""
    from timm.models.hrnet import HighResolutionNet

    def stage(branches: int) -> dict[str, Any]:
        return {
            "num_modules": 1,
            "num_branches": branches,
            "block_type": "BASIC",
            "num_blocks": (1,) * branches,
            "num_channels": (8, 16, 32, 64)[:branches],
            "fuse_method": "SUM",
        }

    first = stage(1) | {"block_type": "BOTTLENECK", "num_channels": (16,)}
    config = {"stem_width": 32, "stage1": first} | {f"stage{k}": stage(k) for k in (2, 3, 4)}
    return HighResolutionNet(config, num_classes=10), (given.pixels(64),), {}


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
