"""FMLP-Rec (Zhou et al., WWW 2022): a learned complex filter over the positions of a history."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.inputs import LENGTH
from tests.zoo.recommenders.histories import FAMILY, ITEMS, histories
from tests.zoo.registry import Built, Scale, entry


class LayerNorm(nn.Module):
    """The norm in the style of TensorFlow: epsilon inside the root, written out."""

    def __init__(self, width: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(spread + self.variance_epsilon)) + self.bias


class FilterLayer(nn.Module):
    """rfft over the positions, a complex weight for each frequency and unit, and back."""

    def __init__(self, width: int, longest: int) -> None:
        super().__init__()
        shape = (1, longest // 2 + 1, width, 2)
        self.complex_weight = nn.Parameter(torch.randn(shape, dtype=torch.float32) * 0.02)
        self.out_dropout = nn.Dropout(0.1)
        self.LayerNorm = LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.complex_weight)
        back = torch.fft.irfft(spectrum, n=length, dim=1, norm="ortho")
        return self.LayerNorm(self.out_dropout(back) + x)


class Intermediate(nn.Module):
    """The feed-forward net, four times as wide."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.LayerNorm = LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dense_1(x)
        hidden = hidden * 0.5 * (1.0 + torch.erf(hidden / 2**0.5))
        return self.LayerNorm(self.dropout(self.dense_2(hidden)) + x)


class Layer(nn.Module):
    """A filter, then the feed-forward net."""

    def __init__(self, width: int, inner: int, longest: int) -> None:
        super().__init__()
        self.filterlayer = FilterLayer(width, longest)
        self.intermediate = Intermediate(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.intermediate(self.filterlayer(x))


class Encoder(nn.Module):
    """The layers, and a list of what each gave."""

    def __init__(self, width: int, inner: int, longest: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, inner, longest) for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        every = []
        for layer in self.layer:
            x = layer(x)
            every.append(x)
        return every


class FMLPRecModel(nn.Module):
    """The last position scores all items by the table of items."""

    def __init__(self, width: int, inner: int, longest: int = LENGTH, items: int = ITEMS) -> None:
        super().__init__()
        self.item_embeddings = nn.Embedding(items, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(longest, width)
        self.LayerNorm = LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.item_encoder = Encoder(width, inner, longest)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.size(1), dtype=torch.long, device=input_ids.device)
        places = places.unsqueeze(0).expand_as(input_ids)
        x = self.item_embeddings(input_ids) + self.position_embeddings(places)
        last = self.item_encoder(self.dropout(self.LayerNorm(x)))[-1][:, -1, :]
        return torch.matmul(last, self.item_embeddings.weight.transpose(0, 1))


@entry("published_fmlp_rec", FAMILY, tags=("complex",))
def fmlp_rec(scale: Scale) -> Built:
    return FMLPRecModel(scale(32), scale(128)), (histories(),), {}
