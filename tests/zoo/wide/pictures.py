"""Models of pictures and volumes: classifiers, U-Nets, detectors, diffusion."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.inputs import normal
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide


def _picture(model: nn.Module, size: int = 32, channels: int = 3) -> Built:
    return model, (normal(2, channels, size, size),), {}


@wide("vit-pytorch", rebuilds=True)
def vit(s: Scale) -> Built:
    from vit_pytorch import ViT

    return _picture(
        ViT(
            image_size=32,
            patch_size=8,
            num_classes=5,
            dim=s(32),
            depth=2,
            heads=s(4),
            mlp_dim=s(64),
            dim_head=8,
        )
    )


@wide("vit-pytorch")  # its sinusoids are made from the width
def simple_vit(s: Scale) -> Built:
    from vit_pytorch import SimpleViT

    return _picture(
        SimpleViT(
            image_size=32,
            patch_size=8,
            num_classes=5,
            dim=s(32),
            depth=2,
            heads=s(4),
            mlp_dim=s(64),
            dim_head=8,
        )
    )


@wide("vit-pytorch")
def cait(s: Scale) -> Built:
    from vit_pytorch.cait import CaiT

    return _picture(
        CaiT(
            image_size=32,
            patch_size=8,
            num_classes=5,
            dim=s(32),
            depth=2,
            cls_depth=1,
            heads=s(4),
            mlp_dim=s(64),
            dim_head=8,
        )
    )


@wide("vit-pytorch")
def cross_vit(s: Scale) -> Built:
    from vit_pytorch.cross_vit import CrossViT

    return _picture(
        CrossViT(
            image_size=32,
            num_classes=5,
            depth=1,
            sm_dim=s(16),
            sm_patch_size=8,
            sm_enc_depth=1,
            sm_enc_heads=2,
            sm_enc_mlp_dim=s(32),
            lg_dim=s(32),
            lg_patch_size=16,
            lg_enc_depth=1,
            lg_enc_heads=2,
            lg_enc_mlp_dim=s(64),
            cross_attn_depth=1,
            cross_attn_heads=2,
        )
    )


@wide("vit-pytorch")
def mobile_vit(s: Scale) -> Built:
    from vit_pytorch.mobile_vit import MobileViT

    return _picture(
        MobileViT(
            image_size=(64, 64),
            dims=[16, 16, 16],
            num_classes=5,
            channels=[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 16],
        ),
        64,
    )


@wide("vit-pytorch")
def max_vit(s: Scale) -> Built:
    from vit_pytorch.max_vit import MaxViT

    return _picture(
        MaxViT(
            num_classes=5, dim_conv_stem=s(16), dim=s(16), dim_head=8, depth=(1, 1), window_size=4
        ),
        32,
    )


@wide("vit-pytorch")
def cvt(s: Scale) -> Built:
    from vit_pytorch.cvt import CvT

    return _picture(
        CvT(
            num_classes=5,
            s1_emb_dim=s(16),
            s2_emb_dim=s(24),
            s3_emb_dim=s(32),
            s1_depth=1,
            s2_depth=1,
            s3_depth=1,
            s1_heads=1,
            s2_heads=2,
            s3_heads=2,
        )
    )


@wide("mlp-mixer-pytorch")
def mixer(s: Scale) -> Built:
    from mlp_mixer_pytorch import MLPMixer

    return _picture(
        MLPMixer(image_size=32, channels=3, patch_size=8, dim=s(32), depth=2, num_classes=5)
    )


@wide("g-mlp-pytorch")
def g_mlp_vision(s: Scale) -> Built:
    from g_mlp_pytorch import gMLPVision

    return _picture(gMLPVision(image_size=32, patch_size=8, num_classes=5, dim=s(32), depth=2))


@wide("lambda-networks")
def lambda_layer(s: Scale) -> Built:
    from lambda_networks import LambdaLayer

    return _picture(
        nn.Sequential(
            nn.Conv2d(3, s(32), 3, padding=1),
            LambdaLayer(dim=s(32), dim_out=s(32), n=8, dim_k=8, heads=4, dim_u=1),
            nn.ReLU(),
            nn.Conv2d(s(32), 5, 1),
        ),
        8,
    )


@wide("bottleneck-transformer-pytorch")
def bottleneck(s: Scale) -> Built:
    from bottleneck_transformer_pytorch import BottleStack

    return _picture(
        BottleStack(dim=s(32), fmap_size=8, dim_out=s(64), num_layers=1, heads=s(4), dim_head=8),
        8,
        s(32),
    )


@wide("halonet-pytorch")
def halo(s: Scale) -> Built:
    from halonet_pytorch import HaloAttention

    stem = nn.Conv2d(3, s(32), 3, padding=1)
    return _picture(
        nn.Sequential(
            stem, HaloAttention(dim=s(32), block_size=4, halo_size=2, dim_head=8, heads=s(4))
        ),
        8,
    )


@wide("efficientnet-pytorch", "settle")
def efficientnet(s: Scale) -> Built:
    from efficientnet_pytorch import EfficientNet

    return _picture(EfficientNet.from_name("efficientnet-b0", num_classes=5, image_size=64), 64)


@wide("resnest", "settle", "large")
def resnest(s: Scale) -> Built:
    from resnest.torch import resnest50

    return _picture(resnest50(pretrained=False, num_classes=5), 64)


@wide("pretrainedmodels", "settle", "large")
def se_resnet(s: Scale) -> Built:
    import pretrainedmodels

    return _picture(pretrainedmodels.se_resnet50(num_classes=1000, pretrained=None), 224)


@wide("siren-pytorch")
def siren(s: Scale) -> Built:
    from siren_pytorch import SirenNet

    return SirenNet(dim_in=2, dim_hidden=s(32), dim_out=3, num_layers=3), (normal(3, 7, 2),), {}


@wide("segmentation-models-pytorch", "settle")
def smp_unet(s: Scale) -> Built:
    import segmentation_models_pytorch as smp

    return _picture(
        smp.Unet("resnet18", encoder_weights=None, classes=2, decoder_channels=(64, 32, 16, 8, 8)),
        64,
    )


@wide("segmentation-models-pytorch", "settle")
def smp_fpn(s: Scale) -> Built:
    import segmentation_models_pytorch as smp

    return _picture(smp.FPN("resnet18", encoder_weights=None, classes=2), 64)


@wide("segmentation-models-pytorch", "settle", "large")
def smp_deeplab(s: Scale) -> Built:
    import segmentation_models_pytorch as smp

    return _picture(smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=2), 64)


@wide("segmentation-models-pytorch", "settle")
def smp_linknet(s: Scale) -> Built:
    import segmentation_models_pytorch as smp

    return _picture(smp.Linknet("resnet18", encoder_weights=None, classes=2), 64)


@wide("monai", rebuilds=True)
def monai_unet(s: Scale) -> Built:
    from monai.networks.nets import UNet

    return _picture(
        UNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            channels=s.each((16, 32, 64)),
            strides=(2, 2),
            num_res_units=1,
        ),
        32,
        1,
    )


@wide("monai", rebuilds=True)
def basic_unet(s: Scale) -> Built:
    from monai.networks.nets import BasicUNet

    return _picture(
        BasicUNet(
            spatial_dims=2, in_channels=1, out_channels=2, features=s.each((8, 8, 16, 32, 32, 8))
        ),
        32,
        1,
    )


@wide("monai")
def unetr(s: Scale) -> Built:
    from monai.networks.nets import UNETR

    return _picture(
        UNETR(
            in_channels=1,
            out_channels=2,
            img_size=32,
            feature_size=s(8),
            hidden_size=s(32),
            mlp_dim=s(64),
            num_heads=4,
            spatial_dims=2,
        ),
        32,
        1,
    )


@wide("monai", "large")
def swin_unetr(s: Scale) -> Built:
    from monai.networks.nets import SwinUNETR

    return _picture(
        SwinUNETR(
            in_channels=1,
            out_channels=2,
            feature_size=12,
            spatial_dims=2,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 4),
            window_size=4,
        ),
        64,
        1,
    )


@wide("monai")
def segresnet(s: Scale) -> Built:
    from monai.networks.nets import SegResNet

    return _picture(SegResNet(spatial_dims=2, init_filters=8, in_channels=1, out_channels=2), 32, 1)


@wide("monai", "settle")
def monai_densenet(s: Scale) -> Built:
    from monai.networks.nets import DenseNet

    return _picture(
        DenseNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=5,
            init_features=16,
            growth_rate=8,
            block_config=(2, 2),
        ),
        32,
        1,
    )


@wide("monai")
def autoencoder_kl(s: Scale) -> Built:
    from monai.networks.nets import AutoEncoder

    return _picture(
        AutoEncoder(
            spatial_dims=2, in_channels=1, out_channels=1, channels=s.each((8, 16)), strides=(2, 2)
        ),
        16,
        1,
    )


@wide("diffusers", rebuilds=True)
def unet2d(s: Scale) -> Built:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=tuple(s.each((32, 64))),
        norm_num_groups=s(8),
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, (normal(2, 3, 16, 16), torch.tensor([3, 7])), {"return_dict": False}


@wide("diffusers")
def unet2d_condition(s: Scale) -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(s.each((32, 64))),
        layers_per_block=1,
        cross_attention_dim=s(32),
        norm_num_groups=s(8),
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    given = (normal(2, 4, 16, 16), torch.tensor([3, 7]), normal(2, 5, s(32)))
    return model, given, {"return_dict": False}


@wide("diffusers")
def autoencoder(s: Scale) -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, (normal(2, 3, 16, 16),), {"return_dict": False}


@wide("diffusers")
def vq_model(s: Scale) -> Built:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        num_vq_embeddings=12,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, (normal(2, 3, 16, 16),), {"return_dict": False}


@wide("diffusers")
def dit(s: Scale) -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=12,
    )
    kwargs = {
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
        "return_dict": False,
    }
    return model, (normal(2, 4, 8, 8),), kwargs


@wide("diffusers")
def sd3(s: Scale) -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    )
    kwargs = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 5, 24),
        "pooled_projections": normal(2, 24),
        "timestep": torch.tensor([3, 7]),
        "return_dict": False,
    }
    return model, (), kwargs


@wide("diffusers")
def pixart(s: Scale) -> Built:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        cross_attention_dim=32,
        use_additional_conditions=False,
    )
    kwargs = {
        "encoder_hidden_states": normal(2, 5, 24),
        "timestep": torch.tensor([3, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return model, (normal(2, 4, 8, 8),), kwargs


@wide("denoising-diffusion-pytorch")
def ddpm_unet(s: Scale) -> Built:
    from denoising_diffusion_pytorch import Unet

    model = Unet(dim=16, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, flash_attn=False)
    return model, (normal(2, 3, 16, 16), torch.tensor([3, 7])), {}


@wide("ultralytics", "settle")
def yolo(s: Scale) -> Built:
    from ultralytics.nn.tasks import DetectionModel

    return _picture(DetectionModel("yolov8n.yaml", nc=4, verbose=False), 64)


@wide("ultralytics", "settle", "large")
def yolo11(s: Scale) -> Built:
    from ultralytics.nn.tasks import DetectionModel

    return _picture(DetectionModel("yolo11n.yaml", nc=4, verbose=False), 64)


@wide("torchxrayvision", "settle")
def xray(s: Scale) -> Built:
    import torchxrayvision as xrv

    return _picture(
        xrv.models.DenseNet(
            num_classes=5,
            in_channels=1,
            growth_rate=8,
            block_config=(2, 2, 2, 2),
            num_init_features=16,
        ),
        64,
        1,
    )


@wide("segment-anything")
def sam_encoder(s: Scale) -> Built:
    from segment_anything.modeling import ImageEncoderViT

    return _picture(
        ImageEncoderViT(
            img_size=64,
            patch_size=16,
            embed_dim=s(32),
            depth=2,
            num_heads=4,
            out_chans=s(16),
            use_rel_pos=True,
            window_size=2,
            global_attn_indexes=(1,),
        ),
        64,
    )


@wide("segment-anything")
def sam_decoder(s: Scale) -> Built:
    from segment_anything.modeling.transformer import TwoWayTransformer

    model = TwoWayTransformer(depth=2, embedding_dim=s(32), num_heads=4, mlp_dim=s(64))
    return model, (normal(2, s(32), 4, 4), normal(2, s(32), 4, 4), normal(2, 5, s(32))), {}


@wide("pytorchvideo", "settle", "large")
def slow_r50(s: Scale) -> Built:
    from pytorchvideo.models import create_resnet

    model = create_resnet(
        input_channel=3,
        model_depth=50,
        model_num_class=5,
        head_pool=None,
        head_output_with_global_average=True,
        stem_conv_kernel_size=(1, 7, 7),
    )
    return model, (normal(1, 3, 4, 32, 32).repeat(2, 1, 1, 1, 1),), {}


@wide("pytorchvideo", "settle", "large")
def mvit(s: Scale) -> Built:
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    model = create_multiscale_vision_transformers(
        spatial_size=32,
        temporal_size=4,
        depth=2,
        patch_embed_dim=32,
        num_heads=2,
        head_num_classes=5,
    )
    return model, (normal(2, 3, 4, 32, 32),), {}


@wide("kornia", "settle")
def hardnet(s: Scale) -> Built:
    from kornia.feature import HardNet

    return _picture(HardNet(pretrained=False), 32, 1)


@wide("kornia", "settle")
def tfeat(s: Scale) -> Built:
    from kornia.feature import TFeat

    return _picture(TFeat(pretrained=False), 32, 1)


@wide("neuralop")
def fno(s: Scale) -> Built:
    from neuralop.models import FNO

    return _picture(
        FNO(n_modes=(4, 4), in_channels=3, out_channels=2, hidden_channels=s(16), n_layers=2), 16
    )
