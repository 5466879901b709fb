"""Recommenders of libraries."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.zoo.inputs import tokens
from tests.zoo.recommenders.histories import histories, lengths
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide

ITEMS = 97


class Scores(nn.Module):
    """A sequential model of RecBole: the vector of a history against the table of items."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, history: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.inner(history, length) @ self.inner.item_embedding.weight.t()


def _recbole(name: str, **more: object) -> Built:
    import recbole.model.sequential_recommender as models

    names = {
        "USER_ID_FIELD": "user",
        "ITEM_ID_FIELD": "item",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": 7,
        "device": "cpu",
        "loss_type": "CE",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "hidden_dropout_prob": 0.1,
        "attn_dropout_prob": 0.1,
    }
    config = _Config({**names, **more})
    dataset = SimpleNamespace(num=lambda field: ITEMS if field == "item" else 11, field2seqlen={})
    ids = histories().flip(1)
    return Scores(getattr(models, name)(config, dataset)), (ids, lengths(ids)), {}


class _Config(dict):
    """A config of RecBole answers None for what it does not hold."""

    def __missing__(self, key: str) -> None:
        return None


@wide("recbole", rebuilds=True)
def recbole_sasrec(s: Scale) -> Built:
    return _recbole("SASRec", n_layers=2, n_heads=s(4), hidden_size=s(32), inner_size=s(64))


@wide("recbole", rebuilds=True)
def gru4rec(s: Scale) -> Built:
    return _recbole(
        "GRU4Rec", embedding_size=s(32), hidden_size=s(32), num_layers=1, dropout_prob=0.1
    )


@wide("recbole")
def narm(s: Scale) -> Built:
    return _recbole(
        "NARM", embedding_size=s(32), hidden_size=s(32), n_layers=1, dropout_probs=[0.1, 0.1]
    )


@wide("recbole")
def stamp(s: Scale) -> Built:
    return _recbole("STAMP", embedding_size=s(32))


@wide("torch-rechub")
def rechub_cross(s: Scale) -> Built:
    from torch_rechub.basic.layers import MLP, CrossNetwork

    return (
        nn.Sequential(nn.Linear(12, s(32)), CrossNetwork(s(32), 2), MLP(s(32), dims=[s(32)])),
        (tokens().float().repeat(1, 2)[:, :12] / 50,),
        {},
    )


@wide("torch-rechub")
def rechub_mmoe(s: Scale) -> Built:
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.multi_task import MMOE

    features = [SparseFeature("a", 11, embed_dim=8), SparseFeature("b", 13, embed_dim=8)]
    model = MMOE(
        features,
        ["classification", "classification"],
        3,
        {"dims": [s(32)]},
        [{"dims": [s(16)]}, {"dims": [s(16)]}],
    )

    class Pair(nn.Module):
        """Two columns as arguments."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner({"a": a, "b": b})

    return Pair(), (torch.tensor([3, 9, 4]), torch.tensor([1, 12, 7])), {}


def _deepctr(name: str, **more: object) -> Built:
    import deepctr_torch.models as models
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    columns = [SparseFeat(f"c{i}", 11, embedding_dim=8) for i in range(3)] + [DenseFeat("d", 4)]
    model = getattr(models, name)(columns, columns, device="cpu", **more)
    rows = torch.cat([tokens(length=3).float() % 11, torch.linspace(0, 1, 12).view(3, 4)], 1)
    return model, (rows,), {}


@wide("deepctr-torch")
def deepctr_deepfm(s: Scale) -> Built:
    return _deepctr("DeepFM", dnn_hidden_units=(s(32), s(32)))


@wide("deepctr-torch")
def xdeepfm(s: Scale) -> Built:
    return _deepctr("xDeepFM", dnn_hidden_units=(s(32), s(32)), cin_layer_size=(s(16), s(16)))


@wide("deepctr-torch")
def deepctr_dcn(s: Scale) -> Built:
    return _deepctr("DCN", dnn_hidden_units=(s(32), s(32)))
