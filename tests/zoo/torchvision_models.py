"""torchvision: the smallest variants at reduced resolution."""

from __future__ import annotations

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "torchvision"


def named(name: str, model: str, size: int = 64) -> None:
    """Registers a model of torchvision that has no config to scale."""

    def make(scale: Scale) -> Built:
        import torchvision

        net = torchvision.models.get_model(model, weights=None, num_classes=10)
        return net, (given.pixels(size),), {}

    entry(name, FAMILY, rebuilds=False)(make)


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


named("tv_resnet", "resnet18")
