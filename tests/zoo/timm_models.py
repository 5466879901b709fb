"""timm: a row names a registered model and the keyword arguments that make it small."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "timm"
WIDTHS = frozenset(
    {
        "embed_dim",
        "embed_dims",
        "num_heads",
        "dims",
        "dim",
        "growth_rate",
        "hidden_dim",
        "channels",
        "stem_chs",
        "widths",
        "head_widths",
        "head_width",
        "base_dims",
        "heads",
        "hidden_sizes",
        "partial_dim",
        "base_dim",
        "inner_dim",
        "num_heads_inner",
        "num_heads_outer",
        "init_channels",
        "feature_dim",
        "growth_rates",
        "num_init_features",
        "stem_hidden_dim",
        "width_list",
        "head_hidden_size",
        "cardinality",
        "qk_dims",
        "group",
        "neck_chans",
        "num_features",
    }
)


@dataclass(frozen=True)
class Row:
    """A model of timm at `size` x `size` pixels; it rebuilds where a keyword is a width.

    `model` is a registered name or "module:Class"; values that start with "timm." or "torch." name
    an object to import.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    size: int = 32
    rebuilds: bool | None = None
    tags: tuple[str, ...] = ()
    widths: frozenset[str] = WIDTHS

    def truthful(self) -> bool:
        """Says whether the small config is built by the class itself."""
        scaled = not self.widths.isdisjoint(self.config)
        return scaled if self.rebuilds is None else self.rebuilds

    def make(self, scale: Scale) -> Built:
        """Builds the model with every width scaled."""
        import timm

        config = {"num_classes": 10} | scale.keys(self.config, self.widths)
        config = {key: _imported(value) for key, value in config.items()}
        module, _, name = self.model.rpartition(":")
        if module:
            model = pkgutil.resolve_name(f"timm.models.{module}:{name}")(**config)
        else:
            model = timm.create_model(name, **config)
        return model, (given.pixels(self.size),), {}


def _imported(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_imported(item) for item in value)
    named = isinstance(value, str) and value.startswith(("timm.", "torch."))
    return pkgutil.resolve_name(value) if named else value


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 8}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (4, 8),
}
STAGES = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}

LIST = (
    Row("timm_vit", "vit_tiny_patch16_224", VIT),
    Row("timm_deit", "deit_tiny_distilled_patch16_224", VIT),
    Row("timm_swin", "swin_tiny_patch4_window7_224", SWIN),
    Row("timm_convnext", "convnext_atto", STAGES, 64),
    Row("timm_resnet", "resnet18", {"channels": (32, 48, 64, 96)}, 64, rebuilds=False),
    Row("timm_densenet", "densenet121", {"growth_rate": 8, "block_config": (2, 2, 2)}, 64),
    Row("timm_regnet", "regnety_002", {}, 64),
)

TRANSFORMERS = (
    Row("timm_beit", "beit:Beit", VIT | {"use_rel_pos_bias": True, "init_values": 0.1}),
    Row("timm_cait", "cait:Cait", VIT | {"init_values": 0.1}),
    Row("timm_deit3", "deit3_small_patch16_224", VIT),
    Row(
        "timm_vit_gap",
        "vit_small_patch16_36x1_224",
        VIT | {"global_pool": "avg", "class_token": False},
    ),
    Row("timm_vit_parallel", "vit_small_patch16_18x2_224", VIT),
    Row("timm_vit_siglip", "vit_base_patch16_siglip_224", VIT),
    Row("timm_vit_registers", "vit_medium_patch16_reg4_gap_256", VIT),
    Row("timm_vit_swiglu", "vit_giant_patch14_dinov2", VIT | {"mlp_ratio": 4.0}),
    Row("timm_vit_clip", "vit_base_patch32_clip_224", VIT),
    Row("timm_vit_xp", "vit_base_patch16_xp_224", VIT),
    Row("timm_aimv2", "aimv2_large_patch14_224", VIT),
    Row("timm_beit3", "beit3_base_patch16_224", VIT),
    Row("timm_vit_relpos", "vit_relpos_small_patch16_224", VIT, rebuilds=False),
    Row("timm_vit_srelpos", "vit_srelpos_small_patch16_224", VIT, rebuilds=False),
    Row(
        "timm_samvit",
        "vision_transformer_sam:VisionTransformerSAM",
        VIT
        | {"use_rel_pos": True, "window_size": 2, "global_attn_indexes": (1,), "neck_chans": 32},
    ),
    Row(
        "timm_eva",
        "eva:Eva",
        VIT
        | {
            "swiglu_mlp": True,
            "use_rot_pos_emb": True,
            "ref_feat_shape": (4, 4),
            "scale_mlp": True,
        },
    ),
    Row("timm_eva_rope", "vit_small_patch16_rope_224", VIT),
    Row("timm_eva_dinov3", "vit_small_patch16_dinov3", VIT),
    Row(
        "timm_naflexvit",
        "naflexvit_base_patch16_gap",
        {
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 8,
            "patch_size": 8,
            "pos_embed_grid_size": (4, 4),
        },
    ),
    Row(
        "timm_convit",
        "convit:ConVit",
        VIT | {"embed_dim": 8, "local_up_to_layer": 1},
        widths=WIDTHS - {"embed_dim"},
    ),
    Row("timm_xcit", "xcit:Xcit", VIT | {"eta": 0.1}),
    Row(
        "timm_crossvit",
        "crossvit:CrossVit",
        {
            "img_size": 48,
            "img_scale": (1.0, 2 / 3),
            "patch_size": (6, 8),
            "embed_dim": (32, 64),
            "depth": ((1, 1, 0),),
            "num_heads": (4, 8),
            "mlp_ratio": (2.0, 2.0, 1.0),
        },
        48,
    ),
    Row(
        "timm_coat",
        "coat:CoaT",
        {
            "img_size": 64,
            "patch_size": 4,
            "embed_dims": (32, 32, 64, 64),
            "serial_depths": (1, 1, 1, 1),
            "num_heads": 8,
            "crpe_window": {3: 2, 5: 3, 7: 3},
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_davit",
        "davit:DaVit",
        {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (4, 8), "window_size": 4},
    ),
    Row(
        "timm_efficientformer",
        "efficientformer:EfficientFormer",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_vit": 1},
        224,
        rebuilds=False,
    ),
    Row(
        "timm_efficientformerv2",
        "efficientformer_v2:EfficientFormerV2",
        {
            "depths": (1, 1, 1, 2),
            "img_size": 64,
            "embed_dims": (16, 24, 32, 48),
            "num_vit": 1,
            "downsamples": (False, True, True, True),
            "mlp_ratios": ((4.0,), (4.0,), (4.0,), (4.0, 4.0)),
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_efficientvit_mit",
        "efficientvit_mit:EfficientVit",
        {
            "widths": (8, 16, 32, 64, 128),
            "depths": (1, 1, 1, 1, 1),
            "head_dim": 8,
            "head_widths": (64, 96),
        },
        64,
    ),
    Row(
        "timm_efficientvit_msra",
        "efficientvit_msra:EfficientVitMsra",
        {
            "img_size": 128,
            "embed_dim": (32, 48, 64),
            "key_dim": (8, 8, 8),
            "depth": (1, 1, 1),
            "num_heads": (4, 4, 4),
        },
        128,
        rebuilds=False,
    ),
    Row(
        "timm_gcvit",
        "gcvit:GlobalContextVit",
        {
            "img_size": 64,
            "embed_dim": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (2, 4, 8, 16),
            "window_ratio": (16, 16, 16, 32),
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_hiera",
        "hiera:Hiera",
        {
            "img_size": (64, 64),
            "embed_dim": 16,
            "num_heads": 2,
            "stages": (1, 1, 1),
            "q_pool": 2,
            "mask_unit_size": (4, 4),
            "mask_unit_attn": (True, True, False),
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_hieradet",
        "hieradet_sam2:HieraDet",
        {
            "embed_dim": 16,
            "num_heads": 2,
            "stages": (1, 2, 2, 1),
            "global_att_blocks": (2,),
            "window_spec": (8, 4, 8, 4),
        },
        128,
        rebuilds=False,
    ),
    Row(
        "timm_levit",
        "levit:Levit",
        {"img_size": 64, "embed_dim": (32, 48), "key_dim": 8, "depth": (1, 1), "num_heads": (4, 6)},
        64,
        rebuilds=False,
    ),
    Row("timm_mvitv2", "mvitv2_tiny", {"img_size": 64}, 64),
    Row(
        "timm_nest",
        "nest:Nest",
        {
            "img_size": 32,
            "patch_size": 2,
            "num_levels": 2,
            "embed_dims": (32, 64),
            "num_heads": (4, 8),
            "depths": (1, 1),
        },
    ),
    Row(
        "timm_nextvit",
        "nextvit:NextViT",
        {"in_chans": 3, "stem_chs": (16, 8, 16), "depths": (1, 2, 5, 2), "head_dim": 8},
        64,
        rebuilds=False,
        tags=("settle",),
    ),
    Row(
        "timm_pit",
        "pit:PoolingVisionTransformer",
        {
            "img_size": 64,
            "patch_size": 8,
            "stride": 4,
            "base_dims": (8, 8, 8),
            "depth": (1, 1, 1),
            "heads": (2, 4, 8),
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_pvt_v2",
        "pvt_v2:PyramidVisionTransformerV2",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (2, 4, 6, 8)},
        64,
    ),
    Row(
        "timm_shvit",
        "shvit:SHViT",
        {
            "embed_dim": (32, 64, 128),
            "qk_dim": (16, 16, 16),
            "partial_dim": (8, 16, 32),
            "depth": (1, 1, 1),
            "types": ("i", "s", "s"),
        },
        64,
        tags=("width-scalar",),
        widths=WIDTHS | {"qk_dim"},
    ),
    Row(
        "timm_swiftformer",
        "swiftformer:SwiftFormer",
        {"layers": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]},
        64,
    ),
    Row("timm_swinv2", "swin_transformer_v2:SwinTransformerV2", SWIN, rebuilds=False),
    Row(
        "timm_swinv2_cr",
        "swin_transformer_v2_cr:SwinTransformerV2Cr",
        SWIN | {"window_ratio": None},
        rebuilds=False,
    ),
    Row(
        "timm_tiny_vit",
        "tiny_vit:TinyVit",
        {
            "embed_dims": (16, 32, 48, 64),
            "depths": (1, 1, 1, 1),
            "num_heads": (2, 4, 6, 8),
            "window_sizes": (4, 4, 4, 2),
        },
        64,
    ),
    Row(
        "timm_tnt",
        "tnt:TNT",
        {
            "img_size": 32,
            "patch_size": 16,
            "embed_dim": 64,
            "inner_dim": 16,
            "depth": 2,
            "num_heads_inner": 2,
            "num_heads_outer": 8,
        },
        rebuilds=False,
    ),
    Row(
        "timm_twins_pcpvt",
        "twins_pcpvt_small",
        {
            "img_size": 64,
            "embed_dims": (16, 32, 48, 64),
            "num_heads": (2, 4, 6, 8),
            "depths": (1, 1, 1, 1),
        },
        64,
    ),
    Row(
        "timm_twins_svt",
        "twins_svt_small",
        {
            "img_size": 64,
            "embed_dims": (16, 32, 48, 64),
            "num_heads": (2, 4, 6, 8),
            "depths": (2, 2, 2, 2),
        },
        64,
    ),
    Row(
        "timm_visformer",
        "visformer:Visformer",
        {
            "img_size": 64,
            "patch_size": 16,
            "init_channels": 8,
            "embed_dim": 64,
            "depth": (1, 1, 1),
            "num_heads": 8,
            "group": 4,
            "attn_stage": "011",
            "spatial_conv": "100",
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_volo",
        "volo:VOLO",
        {
            "layers": (1, 1, 1, 1),
            "img_size": 64,
            "embed_dims": (32, 64, 64, 64),
            "num_heads": (4, 8, 8, 8),
            "stem_hidden_dim": 16,
            "mlp_ratio": 3.0,
        },
        64,
    ),
    Row("timm_vitamin", "vitamin_small_224", {"img_size": 64, "depth": 2}, 64),
    Row(
        "timm_vit_hybrid",
        "vit_tiny_r_s16_p8_224",
        {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 8},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_edgenext",
        "edgenext:EdgeNeXt",
        {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1), "heads": (2, 3, 4, 6)},
        64,
        rebuilds=False,
    ),
    Row("timm_mobilevit", "mobilevit_xxs", {}, 64),
    Row("timm_mobilevitv2", "mobilevitv2_050", {}, 64),
    Row("timm_coatnet", "coatnet_pico_rw_224", {"img_size": 64}, 64),
    Row("timm_maxvit_rw", "maxvit_rmlp_pico_rw_256", {"img_size": 64}, 64),
    Row(
        "timm_fastvit",
        "fastvit:FastVit",
        {
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 32, 64, 128),
            "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
            "se_downsamples": (False, False, True, False),
        },
        64,
        rebuilds=False,
    ),
    Row(
        "timm_repvit",
        "repvit:RepVit",
        {"embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1)},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_iformer",
        "iformer:IFormer",
        {"dims": (16, 24, 32, 64), "depths": (1, 1, 9, 6)},
        64,
        rebuilds=False,
    ),
    Row("timm_lowformer", "lowformer_b0", {}, 64),
    Row("timm_cpubone", "cpubone_nano", {}, 64),
    Row("timm_efficientvim", "efficientvim_m1", {}, 64),
    Row(
        "timm_csatv2",
        "csatv2:CSATv2",
        {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1), "transformer_depths": (0, 0, 1, 1)},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_gemma4_vit",
        "gemma4_vit_167m",
        {
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 8,
            "head_dim": 8,
            "intermediate_size": 128,
            "position_embedding_size": 40,
            "img_size": 48,
        },
        48,
        widths=WIDTHS | {"intermediate_size"},
    ),
    Row("timm_qwen3_vit", "qwen3_vit_88m", {"embed_dim": 64, "depth": 2, "num_heads": 8}, 64),
    Row(
        "timm_deepseek_vit",
        "deepseek_vit_412m",
        {"img_size": 56, "embed_dim": 64, "depth": 2, "num_heads": 8, "mlp_ratio": 2.75},
        56,
    ),
)

CONVOLUTIONS = (
    Row(
        "timm_caformer",
        "metaformer:MetaFormer",
        STAGES
        | {"dims": (16, 32, 128, 256)}
        | {
            "token_mixers": (
                "timm.models.metaformer:SepConv",
                "timm.models.metaformer:SepConv",
                "timm.models.metaformer:Attention",
                "timm.models.metaformer:Attention",
            ),
            "use_mlp_head": False,
            "norm_layers": ("timm.models.metaformer:LayerNorm2dNoBias",) * 2
            + ("timm.models.metaformer:LayerNormNoBias",) * 2,
        },
        64,
    ),
    Row(
        "timm_convformer",
        "metaformer:MetaFormer",
        STAGES | {"token_mixers": "timm.models.metaformer:SepConv"},
        64,
    ),
    Row("timm_convnextv2", "convnextv2_atto", STAGES, 64),
    Row(
        "timm_convmixer",
        "convmixer:ConvMixer",
        {"dim": 64, "depth": 2, "kernel_size": 5, "patch_size": 4},
    ),
    Row(
        "timm_gmlp",
        "mlp_mixer:MlpMixer",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 64,
            "num_blocks": 2,
            "mlp_ratio": 4.0,
            "block_layer": "timm.models.mlp_mixer:SpatialGatingBlock",
            "mlp_layer": "timm.layers:GatedMlp",
        },
        rebuilds=False,
    ),
    Row(
        "timm_resmlp",
        "mlp_mixer:MlpMixer",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 64,
            "num_blocks": 2,
            "mlp_ratio": 4.0,
            "block_layer": "timm.models.mlp_mixer:ResBlock",
            "norm_layer": "timm.models.mlp_mixer:Affine",
        },
    ),
    Row(
        "timm_gmixer",
        "mlp_mixer:MlpMixer",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 64,
            "num_blocks": 2,
            "mlp_ratio": (1.0, 4.0),
            "mlp_layer": "timm.layers:GluMlp",
        },
    ),
    Row(
        "timm_sequencer",
        "sequencer:Sequencer2d",
        {
            "img_size": 56,
            "layers": (1, 1, 1, 1),
            "embed_dims": (32, 48, 48, 48),
            "hidden_sizes": (16, 24, 24, 24),
            "rnn_layer": "timm.models.sequencer:LSTM2d",
        },
        56,
        tags=("fused-recurrence",),
    ),
    Row(
        "timm_fasternet",
        "fasternet:FasterNet",
        {"embed_dim": 16, "depths": (1, 1, 1, 1), "feature_dim": 128},
        64,
    ),
    Row("timm_focalnet", "focalnet:FocalNet", {"embed_dim": 16, "depths": (1, 1, 1, 1)}, 64),
    Row(
        "timm_inception_next",
        "inception_next:MetaNeXt",
        STAGES | {"dims": (16, 32, 64, 64)},
        64,
        rebuilds=False,
    ),
    Row("timm_mambaout", "mambaout:MambaOut", STAGES | {"dims": (24, 48, 72, 96)}, 64),
    Row(
        "timm_starnet",
        "starnet:StarNet",
        {"base_dim": 16, "depths": [1, 1, 1, 1]},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_rdnet",
        "rdnet:RDNet",
        {
            "growth_rates": (16, 24),
            "num_blocks_list": (2, 2),
            "block_type": ("Block", "BlockESE"),
            "is_downsample_block": (None, True),
            "num_init_features": 32,
        },
        64,
        rebuilds=False,
    ),
    Row("timm_dla", "dla46_c", {}, 64),
    Row("timm_dpn", "dpn48b", {"small": True} | {}, 64),
    Row("timm_byobnet_gernet", "gernet_s", {}, 64),
    Row("timm_byobnet_repvgg", "repvgg_a0", {}, 64),
    Row("timm_byobnet_mobileone", "mobileone_s0", {}, 64, tags=("settle",)),
    Row("timm_byobnet_bat", "bat_resnext26ts", {}, 256, tags=("large",)),
    Row("timm_byobnet_gc", "gcresnet33ts", {}, 64),
    Row("timm_halonet", "halonet26t", {}, 256, tags=("large",)),
    Row("timm_botnet", "botnet26t_256", {"img_size": 64}, 64),
    Row("timm_lambdanet", "lambda_resnet26t", {}, 64),
    Row("timm_cspresnet", "cspresnet50", {}, 64),
    Row("timm_cs3darknet", "cs3darknet_focus_s", {}, 64),
    Row("timm_darknet53", "darknet17", {}, 64),
    Row("timm_cspnext", "cspnext_tiny", {}, 64),
    Row("timm_ghostnet", "ghostnet_050", {}, 64),
    Row("timm_ghostnetv2", "ghostnetv2_100", {}, 64),
    Row("timm_hardcorenas", "hardcorenas_a", {}, 64),
    Row("timm_hgnet", "hgnetv2_b0", {}, 64),
    Row("timm_inception_v3", "inception_v3", {}, 96),
    Row("timm_inception_v4", "inception_v4", {}, 96, tags=("large",)),
    Row("timm_inception_resnet_v2", "inception_resnet_v2", {}, 96, tags=("large",)),
    Row("timm_lcnet", "lcnet_050", {}, 64),
    Row("timm_lcnetv2", "lcnetv2_small", {}, 64),
    Row("timm_fbnetv3", "fbnetv3_b", {}, 64),
    Row("timm_mnasnet", "mnasnet_small", {}, 64),
    Row("timm_mixnet", "mixnet_s", {}, 64),
    Row("timm_mobilenetv1", "mobilenetv1_100", {}, 64),
    Row("timm_mobilenetv2", "mobilenetv2_050", {}, 64),
    Row("timm_mobilenetv4", "mobilenetv4_conv_small_050", {}, 64),
    Row("timm_mobilenetv4_hybrid", "mobilenetv4_hybrid_medium", {}, 64),
    Row("timm_mobilenetv5", "mobilenetv5_base", {}, 64, tags=("large",)),
    Row("timm_tinynet", "tinynet_e", {}, 64),
    Row("timm_efficientnetv2", "efficientnetv2_rw_t", {}, 64),
    Row(
        "timm_nasnet",
        "nasnet:NASNetALarge",
        {"stem_size": 32, "num_features": 384},
        96,
        widths=WIDTHS | {"stem_size"},
    ),
    Row("timm_pnasnet", "pnasnet5large", {}, 96, tags=("large",)),
    Row("timm_nf_regnet", "nf_regnet_b0", {}, 64),
    Row("timm_nf_resnet", "nf_resnet26", {}, 64),
    Row("timm_regnetx", "regnetx_002", {}, 64),
    Row("timm_regnetz", "regnetz_005", {}, 64),
    Row("timm_repghost", "repghostnet_050", {}, 64, tags=("settle",)),
    Row(
        "timm_res2net",
        "res2net50_14w_8s",
        {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)},
        64,
        rebuilds=False,
    ),
    Row("timm_resnest", "resnest14d", {"channels": (16, 32, 48, 64)}, 64, rebuilds=False),
    Row(
        "timm_seresnet",
        "seresnet50",
        {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)},
        64,
        rebuilds=False,
    ),
    Row("timm_ecaresnet", "ecaresnet26t", {"channels": (16, 32, 48, 64)}, 64, rebuilds=False),
    Row(
        "timm_resnet_blur",
        "resnetblur50",
        {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_resnetrs",
        "resnetrs50",
        {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_resnetv2",
        "resnetv2_50",
        {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128), "stem_chs": 32},
        64,
        rebuilds=False,
    ),
    Row(
        "timm_bit",
        "resnetv2:ResNetV2",
        {
            "layers": (1, 1),
            "channels": (128, 256),
            "stem_chs": 32,
            "stem_type": "fixed",
            "conv_layer": "timm.layers:StdConv2d",
            "norm_layer": "timm.layers:GroupNormAct",
        },
        64,
        rebuilds=False,
    ),
    Row("timm_rexnet", "rexnet_100", {}, 64),
    Row("timm_selecsls", "selecsls42", {}, 64),
    Row("timm_senet", "legacy_seresnext26_32x4d", {}, 64),
    Row("timm_sknet", "skresnet18", {"channels": (32, 64, 96, 128)}, 64, rebuilds=False),
    Row("timm_tresnet", "tresnet_m", {}, 64),
    Row(
        "timm_vgg",
        "vgg:VGG",
        {
            "cfg": (16, "M", 32, "M", 48, "M"),
            "norm_layer": "torch.nn:BatchNorm2d",
            "mlp_ratio": 1 / 32,
        },
        64,
    ),
    Row("timm_vovnet", "ese_vovnet19b_slim_dw", {}, 64),
    Row("timm_xception", "legacy_xception", {}, 96),
    Row("timm_xception41", "xception41", {}, 96),
)

for _row in LIST + TRANSFORMERS + CONVOLUTIONS:
    entry(_row.name, FAMILY, rebuilds=_row.truthful(), tags=_row.tags)(_row.make)


@entry("timm_mixer", FAMILY)
def mixer(scale: Scale) -> Built:
    """MLP-Mixer: the hidden axis of the token mixing is a width too, half the embedding."""
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(img_size=32, patch_size=8, embed_dim=scale(64), num_blocks=2, num_classes=10)
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

    arch = [
        ["ds_r1_k3_s1_e1_c16_se0.25"],
        ["ir_r2_k3_s2_e6_c32_se0.25"],
        ["ir_r2_k5_s2_e6_c48_se0.25"],
    ]
    return _mobile(scale, arch, act_layer=SiLU)


@entry("timm_mobilenetv3", FAMILY)
def mobilenetv3(scale: Scale) -> Built:
    """MobileNetV3: hard swish, hard sigmoid gates and a head after the pooling."""
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.mobilenetv3 import MobileNetV3
    from torch.nn import Hardswish

    arch = [
        ["ds_r1_k3_s2_e1_c16_se0.25_nre"],
        ["ir_r2_k3_s2_e4_c32"],
        ["ir_r2_k5_s2_e4_c48_se0.25"],
        ["cn_r1_k1_s1_c96"],
    ]
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
