"""Models of rows of numbers and categories, of policies, and of flows."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.inputs import normal, tokens
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide

CATEGORIES = (5, 7, 3)


def categories() -> torch.Tensor:
    """Draw three categories for each of three rows."""
    return torch.stack([tokens(length=3)[:, i] % n for i, n in enumerate(CATEGORIES)], 1)


@wide("tab-transformer-pytorch")
def tab_transformer(s: Scale) -> Built:
    from tab_transformer_pytorch import TabTransformer

    model = TabTransformer(
        categories=CATEGORIES,
        num_continuous=6,
        dim=s(32),
        depth=2,
        heads=4,
        dim_head=8,
        dim_out=1,
        mlp_act=nn.ReLU(),
    )
    return model, (categories(), normal(3, 6)), {}


@wide("tab-transformer-pytorch")
def ft_transformer(s: Scale) -> Built:
    from tab_transformer_pytorch import FTTransformer

    model = FTTransformer(
        categories=CATEGORIES, num_continuous=6, dim=s(32), depth=2, heads=4, dim_head=8, dim_out=1
    )
    return model, (categories(), normal(3, 6)), {}


@wide("rtdl-revisiting-models", rebuilds=True)
def rtdl_ft_transformer(s: Scale) -> Built:
    from rtdl_revisiting_models import FTTransformer

    model = FTTransformer(
        n_cont_features=6,
        cat_cardinalities=list(CATEGORIES),
        d_out=1,
        n_blocks=2,
        d_block=s(32),
        attention_n_heads=s(4),
        attention_dropout=0.1,
        ffn_d_hidden=s(64),
        ffn_d_hidden_multiplier=None,
        ffn_dropout=0.1,
        residual_dropout=0.0,
    )
    return model, (normal(3, 6), categories()), {}


@wide("rtdl-revisiting-models", rebuilds=True)
def rtdl_resnet(s: Scale) -> Built:
    from rtdl_revisiting_models import ResNet

    model = ResNet(
        d_in=6,
        d_out=1,
        n_blocks=2,
        d_block=s(32),
        d_hidden=s(64),
        d_hidden_multiplier=None,
        dropout1=0.1,
        dropout2=0.0,
    )
    return model, (normal(3, 6),), {}


@wide("rtdl-revisiting-models", rebuilds=True)
def rtdl_mlp(s: Scale) -> Built:
    from rtdl_revisiting_models import MLP

    return MLP(d_in=6, d_out=1, n_blocks=2, d_block=s(32), dropout=0.1), (normal(3, 6),), {}


@wide("rtdl-num-embeddings")
def periodic(s: Scale) -> Built:
    from rtdl_num_embeddings import PeriodicEmbeddings

    model = nn.Sequential(
        PeriodicEmbeddings(6, s(16), lite=False),
        nn.Flatten(),
        nn.Linear(6 * s(16), s(32)),
        nn.ReLU(),
        nn.Linear(s(32), 1),
    )
    return model, (normal(3, 6),), {}


@wide("pytorch-tabnet", "settle")
def tabnet(s: Scale) -> Built:
    from pytorch_tabnet.tab_network import TabNet

    model = TabNet(6, 1, n_d=s(8), n_a=s(8), n_steps=2, group_attention_matrix=torch.eye(6))
    return model, (normal(4, 6),), {}


@wide("pytorch-tabnet", "settle")
def tabnet_encoder(s: Scale) -> Built:
    from pytorch_tabnet.tab_network import FeatTransformer

    shared = nn.ModuleList([nn.Linear(6, 2 * s(16), bias=False)])
    return FeatTransformer(6, s(16), shared, 2, virtual_batch_size=8), (normal(4, 6),), {}


@wide("torchrl", rebuilds=True)
def policy(s: Scale) -> Built:
    from torchrl.modules import MLP

    return MLP(in_features=6, out_features=4, num_cells=s.each((32, 32))), (normal(3, 6),), {}


@wide("torchrl")
def decision_convnet(s: Scale) -> Built:
    from torchrl.modules import ConvNet

    return ConvNet(in_features=3, num_cells=s.each((8, 16))), (normal(2, 3, 32, 32),), {}


@wide("zuko")
def masked_mlp(s: Scale) -> Built:
    from zuko.nn import MLP

    return MLP(6, 4, hidden_features=s.each((32, 32))), (normal(3, 6),), {}


@wide("zuko")
def autoregressive(s: Scale) -> Built:
    from zuko.nn import MaskedMLP

    adjacency = torch.ones(6, 6).tril(-1).bool()
    return MaskedMLP(adjacency, hidden_features=[32, 32]), (normal(3, 6),), {}
