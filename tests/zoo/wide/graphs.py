"""Models of graphs, points and fields."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.inputs import normal
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


class OnGraph(nn.Module):
    """A graph network whose edges are an argument."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return self.inner(x, edges)


def _nodes(model: nn.Module) -> Built:
    return OnGraph(model), (normal(6, 12), EDGES), {}


@wide("torch-geometric", rebuilds=True)
def gcn(s: Scale) -> Built:
    from torch_geometric.nn import GCN

    return _nodes(GCN(12, s(32), 2, 5))


@wide("torch-geometric", rebuilds=True)
def sage(s: Scale) -> Built:
    from torch_geometric.nn import GraphSAGE

    return _nodes(GraphSAGE(12, s(32), 2, 5))


@wide("torch-geometric")
def gat(s: Scale) -> Built:
    from torch_geometric.nn import GAT

    return _nodes(GAT(12, s(32), 2, 5, heads=2))


@wide("torch-geometric", rebuilds=True)
def gin(s: Scale) -> Built:
    from torch_geometric.nn import GIN

    return _nodes(GIN(12, s(32), 2, 5))


@wide("torch-geometric")
def light_gcn(s: Scale) -> Built:
    from torch_geometric.nn import LightGCN

    class Pairs(nn.Module):
        """The score of pairs of nodes after the propagation."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = LightGCN(6, s(16), 2)

        def forward(self, edges: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
            vectors = self.inner.get_embedding(edges)
            return (vectors[pairs[:, 0]] * vectors[pairs[:, 1]]).sum(-1)

    return Pairs(), (EDGES, torch.tensor([[0, 3], [1, 4], [5, 2]])), {}


@wide("torch-geometric")
def dense_sage(s: Scale) -> Built:
    from torch_geometric.nn import DenseSAGEConv

    return DenseSAGEConv(12, s(32)), (normal(2, 6, 12), normal(2, 6, 6).sigmoid()), {}


@wide("egnn-pytorch")
def egnn(s: Scale) -> Built:
    from egnn_pytorch import EGNN

    return EGNN(dim=s(32), m_dim=s(16)), (normal(2, 5, s(32)), normal(2, 5, 3)), {}


@wide("e3nn")
def e3nn_linear(s: Scale) -> Built:
    from e3nn.nn import FullyConnectedNet

    return FullyConnectedNet([6, s(32), s(32), 4], torch.tanh), (normal(3, 6),), {}
