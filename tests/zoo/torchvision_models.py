"""torchvision: the smallest variants at reduced resolution, and classes with small configs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "torchvision"

#: name, registered name, side of the image, tags
NAMED: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("tv_resnet", "resnet18", 64, ()),
    ("tv_resnet50", "resnet50", 64, ("large",)),
    ("tv_mobilenet_v2", "mobilenet_v2", 64, ()),
    ("tv_mobilenet_v3_small", "mobilenet_v3_small", 64, ()),
    ("tv_mnasnet", "mnasnet0_5", 64, ()),
    ("tv_squeezenet", "squeezenet1_1", 64, ()),
    ("tv_googlenet", "googlenet", 64, ()),
    ("tv_inception_v3", "inception_v3", 96, ("large",)),
    ("tv_alexnet", "alexnet", 64, ("large",)),
    ("tv_regnet_x", "regnet_x_400mf", 64, ()),
    ("tv_efficientnet_b0", "efficientnet_b0", 64, ()),
    ("tv_efficientnet_v2_s", "efficientnet_v2_s", 64, ()),
    ("tv_swin_v2", "swin_v2_t", 64, ("large",)),
    ("tv_lraspp", "lraspp_mobilenet_v3_large", 64, ()),
    ("tv_deeplabv3_mobilenet", "deeplabv3_mobilenet_v3_large", 64, ()),
    ("tv_fcn_resnet50", "fcn_resnet50", 64, ("large",)),
)


def _named(model: str, size: int, _: Scale) -> Built:
    import torchvision

    more: dict[str, Any] = {"weights": None, "num_classes": 10}
    if model.startswith(("lraspp", "deeplab", "fcn")):
        more["weights_backbone"] = None
    if model in {"googlenet", "inception_v3"}:
        more |= {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(model, **more), (given.pixels(size),), {}


for _name, _model, _size, _tags in NAMED:
    entry(_name, FAMILY, rebuilds=False, tags=_tags)(partial(_named, _model, _size))


@entry("tv_vit", FAMILY)
def vit(scale: Scale) -> Built:
    """Vision transformer with its fused attention."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=scale(8),
        hidden_dim=scale(64),
        mlp_dim=scale(128),
        num_classes=10,
    )
    return model, (given.pixels(32),), {}


@entry("tv_densenet", FAMILY)
def densenet(scale: Scale) -> Built:
    """DenseNet: every layer concatenates, every transition halves."""
    from torchvision.models import DenseNet

    model = DenseNet(
        growth_rate=scale(8), block_config=(2, 2), num_init_features=scale(16), num_classes=10
    )
    return model, (given.pixels(64),), {}


@entry("tv_swin", FAMILY)
def swin(scale: Scale) -> Built:
    """Swin with shifted windows of 4."""
    from torchvision.models import SwinTransformer

    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=scale(32),
        depths=[2, 2],
        num_heads=scale.each((4, 8)),
        window_size=[4, 4],
        num_classes=10,
    )
    return model, (given.pixels(32),), {}


@entry("tv_swin3d", FAMILY)
def swin3d(scale: Scale) -> Built:
    """Swin over video with windows of 2 frames."""
    from torchvision.models.video import SwinTransformer3d

    model = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=scale(32),
        depths=[2, 2],
        num_heads=scale.each((4, 8)),
        window_size=[2, 4, 4],
        num_classes=10,
    )
    return model, (given.normal(2, 3, 6, 32, 32),), {}


@entry("tv_mvit", FAMILY, rebuilds=False)
def mvit(_: Scale) -> Built:
    """MViT: attention whose queries and keys are pooled by depthwise convolutions."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(heads: int, widths: tuple[int, int], stride: int) -> MSBlockConfig:
        kernel, same = [3, 3, 3], [1, stride, stride]
        return MSBlockConfig(heads, *widths, kernel, kernel, same, [1, 2, 2])

    model = MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[block(2, (16, 16), 1), block(4, (16, 32), 2), block(4, (32, 32), 1)],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=10,
    )
    return model, (given.normal(2, 3, 4, 32, 32),), {}


@entry("tv_video_resnet", FAMILY, rebuilds=False, tags=("large",))
def video_resnet(_: Scale) -> Built:
    """R(2+1)D: spatial and temporal convolutions in turn."""
    from torchvision.models.video import r2plus1d_18

    return r2plus1d_18(weights=None, num_classes=10), (given.normal(2, 3, 4, 32, 32),), {}


@entry("tv_convnext", FAMILY)
def convnext(scale: Scale) -> Built:
    """ConvNeXt with permuted layer norms."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = [*scale.each((16, 32, 48)), None]
    stages = [CNBlockConfig(a, b, 1) for a, b in zip(widths, widths[1:], strict=False)]
    return ConvNeXt(stages, num_classes=10), (given.pixels(64),), {}


@entry("tv_regnet_y", FAMILY, rebuilds=False)
def regnet_y(_: Scale) -> Built:
    """RegNet-Y: grouped convolutions and squeeze-and-excitation."""
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams([1, 1], [32, 64], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(params, num_classes=10, stem_width=16), (given.pixels(64),), {}


@entry("tv_shufflenet", FAMILY)
def shufflenet(scale: Scale) -> Built:
    """ShuffleNet: halves of the channels are interleaved after each block."""
    from torchvision.models import ShuffleNetV2

    model = ShuffleNetV2([2, 2, 2], scale.each((16, 32, 64, 128, 96)), num_classes=10)
    return model, (given.pixels(64),), {}


@entry("tv_maxvit", FAMILY)
def maxvit(scale: Scale) -> Built:
    """MaxViT with windows and grids of 4."""
    from torchvision.models import MaxVit

    model = MaxVit(
        input_size=(64, 64),
        stem_channels=scale(32),
        partition_size=4,
        block_channels=scale.each((32, 64)),
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )
    return model, (given.pixels(64),), {}


@entry("tv_vgg", FAMILY)
def vgg(scale: Scale) -> Built:
    """The convolutions of VGG with a small classifier of its own."""
    from torch import nn
    from torchvision.models.vgg import make_layers

    widths = scale.each((16, 32, 48))
    plan: list[str | int] = [widths[0], "M", widths[1], "M", widths[2], widths[2], "M"]
    head = nn.Sequential(nn.Linear(widths[2] * 9, scale(64)), nn.ReLU(), nn.Linear(scale(64), 10))
    layers = (make_layers(plan, batch_norm=True), nn.AdaptiveAvgPool2d(3), nn.Flatten(), head)
    return nn.Sequential(*layers), (given.pixels(32),), {}


def _detector(name: str, **options: Any) -> Callable[[Scale], Built]:
    def make(_: Scale) -> Built:
        import torchvision

        build = getattr(torchvision.models.detection, name)
        model = build(weights=None, weights_backbone=None, num_classes=5, **options)
        return model, ([image for image in given.pixels(64)],), {}

    return make


entry("tv_retinanet", FAMILY, rebuilds=False, tags=("large", "detection"))(
    _detector("retinanet_resnet50_fpn", min_size=64, max_size=64)
)
entry("tv_ssdlite", FAMILY, rebuilds=False, tags=("detection",))(
    _detector("ssdlite320_mobilenet_v3_large")
)
entry("tv_fasterrcnn", FAMILY, rebuilds=False, tags=("large", "detection"))(
    _detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=64)
)


@entry("tv_fpn", FAMILY)
def fpn(scale: Scale) -> Built:
    """Feature pyramid over a small backbone, its levels pooled and classified."""
    import torch
    from torch import nn
    from torchvision.ops import FeaturePyramidNetwork

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Conv2d(3, scale(16), 3, 2, 1)
            self.high = nn.Conv2d(scale(16), scale(32), 3, 2, 1)
            self.pyramid = FeaturePyramidNetwork(scale.each((16, 32)), scale(24))
            self.out = nn.Linear(2 * scale(24), 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = self.low(x).relu()
            levels = self.pyramid({"low": low, "high": self.high(low).relu()})
            return self.out(torch.cat([level.mean((2, 3)) for level in levels.values()], 1))

    return Pyramid(), (given.pixels(32),), {}


@entry("tv_raft", FAMILY, rebuilds=False, tags=("indexed",))
def raft(_: Scale) -> Built:
    """Optical flow by recurrent updates over a correlation volume."""
    from torchvision.models.optical_flow import raft_small

    images = given.pixels(128)
    return raft_small(weights=None), (images, images.flip(3)), {"num_flow_updates": 2}
