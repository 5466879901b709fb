"""Plain torch.nn: the fused layers and small nets written around them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo import inputs as given
from tests.zoo.registry import Built, Scale, entry

FAMILY = "torch.nn"


class Recurrent(nn.Module):
    """Embedding, a recurrent layer and a readout over the last state."""

    def __init__(self, cell: type[nn.RNNBase], scale: Scale, **options: bool | int) -> None:
        super().__init__()
        both = 2 if options.get("bidirectional") else 1
        self.embedding = nn.Embedding(97, scale(32))
        self.cell = cell(scale(32), scale(48), batch_first=True, **options)
        self.readout = nn.Linear(both * scale(48), 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.readout(self.cell(self.embedding(ids))[0][:, -1])


class Attention(nn.Module):
    """Multi-head attention between two projections."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.before = nn.Linear(10, scale(64))
        self.attention = nn.MultiheadAttention(scale(64), scale(8), batch_first=True)
        self.after = nn.Linear(scale(64), 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.before(x)
        mixed, weights = self.attention(h, h, h)
        return self.after(h + mixed), weights


class Encoder(nn.Module):
    """nn.TransformerEncoder over embedded tokens with a padding mask."""

    def __init__(self, scale: Scale, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            scale(64), scale(8), scale(128), batch_first=True, norm_first=norm_first
        )
        self.embedding = nn.Embedding(97, scale(64))
        self.position = nn.Parameter(torch.randn(7, scale(64)))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.readout = nn.Linear(scale(64), 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids) + self.position
        return self.readout(self.encoder(h, src_key_padding_mask=ids == 2).mean(1))


class Translator(nn.Module):
    """nn.Transformer: encoder and decoder."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, scale(64))
        self.transformer = nn.Transformer(scale(64), scale(8), 2, 2, scale(128), batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask)
        return out @ self.embedding.weight.T


class Autoencoder(nn.Module):
    """Variational autoencoder, deterministic: the code is the mean plus a scaled spread."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(30, scale(64)), nn.ReLU())
        self.mean = nn.Linear(scale(64), scale(16))
        self.spread = nn.Linear(scale(64), scale(16))
        self.decode = nn.Sequential(
            nn.Linear(scale(16), scale(64)), nn.Tanh(), nn.Linear(scale(64), 30)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encode(x)
        return self.decode(self.mean(h) + 0.1 * torch.exp(0.5 * self.spread(h)))


class UNet(nn.Module):
    """Two scales, a skip by concatenation and a transposed convolution."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        small, large = scale(16), scale(32)
        self.down = nn.Sequential(
            nn.Conv2d(3, small, 3, padding=1), nn.GroupNorm(scale(4), small), nn.SiLU()
        )
        self.inner = nn.Sequential(
            nn.Conv2d(small, large, 3, 2, 1), nn.BatchNorm2d(large), nn.ReLU(inplace=True)
        )
        self.up = nn.ConvTranspose2d(large, small, 2, 2)
        self.out = nn.Conv2d(2 * small, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.inner(skip))], 1))


class Temporal(nn.Module):
    """Causal dilated convolutions with weight norm over the sequence."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        widths = (scale(32), scale(48), scale(48))
        self.embedding = nn.Embedding(97, widths[0])
        self.layers = nn.ModuleList(
            norm(nn.Conv1d(a, b, 2, dilation=2**k))
            for k, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.readout = nn.Linear(widths[-1], 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids).transpose(1, 2)
        for layer in self.layers:
            h = F.relu(layer(F.pad(h, (layer.dilation[0], 0))))
        return self.readout(h[:, :, -1])


class Glu(nn.Module):
    """Gated convolution, bilinear form, PReLU, RMS norm and an embedding bag."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(97, scale(32), mode="mean")
        self.gate = nn.Linear(scale(32), 2 * scale(64))
        self.bilinear = nn.Bilinear(scale(64), scale(64), scale(16))
        self.prelu = nn.PReLU(scale(16))
        self.norm = nn.RMSNorm(scale(16))
        self.readout = nn.Linear(scale(16), 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = F.glu(self.gate(self.bag(ids)), -1)
        return self.readout(self.norm(self.prelu(self.bilinear(h, h))))


class Cells(nn.Module):
    """LSTM cells unrolled by hand over the sequence."""

    def __init__(self, cell: type[nn.RNNCellBase], scale: Scale) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, scale(32))
        self.cell = cell(scale(32), scale(48))
        self.readout = nn.Linear(scale(48), 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        state = None
        for x in self.embedding(ids).unbind(1):
            state = self.cell(x, state)
        return self.readout(state[0] if isinstance(state, tuple) else state)


def _ids(model: nn.Module) -> Built:
    return model, (given.tokens(),), {}


@entry("nn_transformer_encoder", FAMILY)
def encoder(scale: Scale) -> Built:
    return _ids(Encoder(scale, norm_first=False))


@entry("nn_transformer_encoder_prenorm", FAMILY)
def encoder_prenorm(scale: Scale) -> Built:
    return _ids(Encoder(scale, norm_first=True))


@entry("nn_transformer", FAMILY)
def transformer(scale: Scale) -> Built:
    return Translator(scale), (given.tokens(), given.tokens(length=5)), {}


@entry("nn_multihead_attention", FAMILY)
def attention(scale: Scale) -> Built:
    return Attention(scale), (given.normal(3, 7, 10),), {}


@entry("nn_lstm", FAMILY, tags=("fused-recurrence",))
def lstm(scale: Scale) -> Built:
    return _ids(Recurrent(nn.LSTM, scale))


@entry("nn_gru", FAMILY, tags=("fused-recurrence",))
def gru(scale: Scale) -> Built:
    return _ids(Recurrent(nn.GRU, scale))


@entry("nn_lstm_bidirectional", FAMILY, tags=("fused-recurrence",))
def lstm_bidirectional(scale: Scale) -> Built:
    return _ids(Recurrent(nn.LSTM, scale, bidirectional=True, num_layers=2))


@entry("nn_gru_bidirectional", FAMILY, tags=("fused-recurrence",))
def gru_bidirectional(scale: Scale) -> Built:
    return _ids(Recurrent(nn.GRU, scale, bidirectional=True))


@entry("nn_rnn", FAMILY, tags=("fused-recurrence",))
def rnn(scale: Scale) -> Built:
    return _ids(Recurrent(nn.RNN, scale, num_layers=2))


@entry("nn_lstm_cell", FAMILY)
def lstm_cell(scale: Scale) -> Built:
    return _ids(Cells(nn.LSTMCell, scale))


@entry("nn_gru_cell", FAMILY)
def gru_cell(scale: Scale) -> Built:
    return _ids(Cells(nn.GRUCell, scale))


@entry("nn_mlp", FAMILY)
def mlp(scale: Scale) -> Built:
    """Linear layers alone."""
    widths = (30, scale(64), scale(48))
    net = nn.Sequential(
        nn.Linear(*widths[:2]),
        nn.BatchNorm1d(widths[1]),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(*widths[1:]),
        nn.ELU(),
        nn.Linear(widths[2], 10),
    )
    return net, (given.normal(3, 30),), {}


@entry("nn_autoencoder", FAMILY)
def autoencoder(scale: Scale) -> Built:
    return Autoencoder(scale), (given.normal(3, 30),), {}


@entry("nn_unet", FAMILY)
def unet(scale: Scale) -> Built:
    return UNet(scale), (given.pixels(20),), {}


@entry("nn_temporal", FAMILY)
def temporal(scale: Scale) -> Built:
    return _ids(Temporal(scale))


@entry("nn_gated", FAMILY)
def gated(scale: Scale) -> Built:
    return _ids(Glu(scale))


@entry("nn_conv3d", FAMILY)
def conv3d(scale: Scale) -> Built:
    """Convolutions over video with an instance norm and an adaptive pooling."""
    widths = (scale(16), scale(32))
    net = nn.Sequential(
        nn.Conv3d(3, widths[0], 3, padding=1),
        nn.InstanceNorm3d(widths[0], affine=True),
        nn.LeakyReLU(0.1),
        nn.MaxPool3d(2),
        nn.Conv3d(*widths, 3, padding=1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(widths[1], 10),
    )
    return net, (given.normal(2, 3, 6, 12, 12),), {}
