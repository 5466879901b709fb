"""Models of time series."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from tests.zoo.inputs import normal
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide

HISTORY, HORIZON = 12, 4


class Windowed(nn.Module):
    """A model of neuralforecast on its window of the past alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, past: torch.Tensor) -> torch.Tensor:
        given = {
            "insample_y": past,
            "insample_mask": torch.ones_like(past),
            "hist_exog": None,
            "futr_exog": None,
            "stat_exog": None,
        }
        return self.inner(given)


def _forecaster(name: str, **more: object) -> Built:
    kind = getattr(importlib.import_module("neuralforecast.models"), name)
    model = kind(h=HORIZON, input_size=HISTORY, max_steps=1, **more)
    return Windowed(model), (normal(3, HISTORY, 1),), {}


@wide("neuralforecast")
def nhits(s: Scale) -> Built:
    return _forecaster("NHITS", mlp_units=3 * [[s(32), s(32)]])


@wide("neuralforecast")
def nbeats(s: Scale) -> Built:
    return _forecaster("NBEATS", mlp_units=3 * [[s(32), s(32)]])


@wide("neuralforecast")
def patch_tst(s: Scale) -> Built:
    return _forecaster(
        "PatchTST",
        hidden_size=s(32),
        n_heads=4,
        encoder_layers=2,
        patch_len=4,
        stride=2,
        linear_hidden_size=s(64),
    )


@wide("neuralforecast")
def dlinear(s: Scale) -> Built:
    return _forecaster("DLinear", moving_avg_window=3)


@wide("neuralforecast")
def neural_tcn(s: Scale) -> Built:
    return _forecaster("TCN", encoder_hidden_size=s(16), decoder_hidden_size=s(16), context_size=4)


@wide("neuralforecast")
def neural_lstm(s: Scale) -> Built:
    return _forecaster("LSTM", encoder_hidden_size=s(16), decoder_hidden_size=s(16))


@wide("neuralforecast")
def tft(s: Scale) -> Built:
    return _forecaster("TFT", hidden_size=s(16), n_head=4)


@wide("neuralforecast")
def fedformer(s: Scale) -> Built:
    return _forecaster("FEDformer", hidden_size=s(32), n_head=8, conv_hidden_size=s(16), modes=2)


@wide("neuralforecast")
def autoformer(s: Scale) -> Built:
    return _forecaster("Autoformer", hidden_size=s(32), n_head=4, conv_hidden_size=s(16))


@wide("neuralforecast", "random")  # it samples the keys of its attention
def informer(s: Scale) -> Built:
    return _forecaster("Informer", hidden_size=s(32), n_head=4, conv_hidden_size=s(16))


@wide("neuralforecast")
def timesnet(s: Scale) -> Built:
    return _forecaster(
        "TimesNet", hidden_size=s(16), conv_hidden_size=s(16), encoder_layers=1, top_k=2
    )


@wide("neuralforecast")
def tide(s: Scale) -> Built:
    return _forecaster("TiDE", hidden_size=s(32), decoder_output_dim=s(8))


@wide("neuralforecast")
def kan(s: Scale) -> Built:
    return _forecaster("KAN", hidden_size=s(16))


@wide("itransformer")
def itransformer(s: Scale) -> Built:
    from iTransformer import iTransformer

    model = iTransformer(
        num_variates=5,
        lookback_len=HISTORY,
        dim=s(32),
        depth=2,
        heads=4,
        dim_head=8,
        pred_length=HORIZON,
        use_reversible_instance_norm=False,
    )
    return model, (normal(3, HISTORY, 5),), {}


@wide("itransformer")
def itransformer_reversible(s: Scale) -> Built:
    from iTransformer import iTransformer

    model = iTransformer(
        num_variates=5,
        lookback_len=HISTORY,
        dim=s(32),
        depth=2,
        heads=4,
        dim_head=8,
        pred_length=HORIZON,
        use_reversible_instance_norm=True,
    )
    return model, (normal(3, HISTORY, 5),), {}
