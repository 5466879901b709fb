"""Models of waves and spectrograms."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.inputs import normal
from tests.zoo.registry import Built, Scale
from tests.zoo.wide.registry import wide


@wide("torchaudio")
def conformer(s: Scale) -> Built:
    from torchaudio.models import Conformer

    model = Conformer(
        input_dim=s(32), num_heads=4, ffn_dim=s(64), num_layers=2, depthwise_conv_kernel_size=3
    )
    return model, (normal(3, 7, s(32)), torch.tensor([7, 5, 7])), {}


@wide("torchaudio")
def audio_conv_tasnet(s: Scale) -> Built:
    from torchaudio.models import ConvTasNet

    model = ConvTasNet(
        num_sources=2,
        enc_kernel_size=8,
        enc_num_feats=s(16),
        msk_num_feats=s(8),
        msk_num_hidden_feats=s(16),
        msk_num_layers=2,
        msk_num_stacks=1,
    )
    return model, (normal(2, 1, 64),), {}


@wide("torchaudio", "settle", "large")
def deep_speech(s: Scale) -> Built:
    from torchaudio.models import DeepSpeech

    return DeepSpeech(n_feature=12, n_hidden=s(32), n_class=5), (normal(2, 1, 7, 12),), {}


@wide("torchaudio", "settle", "large")
def wav2letter(s: Scale) -> Built:
    from torchaudio.models import Wav2Letter

    return Wav2Letter(num_classes=5, input_type="mfcc", num_features=12), (normal(2, 12, 60),), {}


@wide("torchaudio")
def emformer(s: Scale) -> Built:
    from torchaudio.models import Emformer

    model = Emformer(
        input_dim=s(32),
        num_heads=4,
        ffn_dim=s(64),
        num_layers=1,
        segment_length=4,
        right_context_length=1,
    )
    return model, (normal(2, 9, s(32)), torch.tensor([9, 7])), {}


@wide("torchaudio")
def audio_wav2vec2(s: Scale) -> Built:
    from torchaudio.models import wav2vec2_model

    model = wav2vec2_model(
        "group_norm",
        [(16, 10, 5), (16, 3, 2)],
        False,
        s(32),
        0.0,
        4,
        2,
        2,
        4,
        0.0,
        s(64),
        0.0,
        0.0,
        False,
        0.0,
        5,
    )
    return model, (normal(2, 200),), {}


@wide("conformer", rebuilds=True)
def conformer_block(s: Scale) -> Built:
    from conformer import Conformer

    model = Conformer(
        s(32),
        depth=1,
        dim_head=8,
        heads=s(4),
        ff_mult=2,
        conv_expansion_factor=2,
        conv_kernel_size=3,
    )
    return model, (normal(3, 7, s(32)),), {}


@wide("speechbrain", rebuilds=True)
def ecapa_tdnn(s: Scale) -> Built:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    model = ECAPA_TDNN(
        12,
        channels=s.each((16, 16, 16, 16, 48)),
        kernel_sizes=[5, 3, 3, 3, 1],
        dilations=[1, 2, 3, 4, 1],
        attention_channels=s(16),
        lin_neurons=s(24),
        res2net_scale=4,
        se_channels=s(16),
        global_context=False,
    )
    return model, (normal(3, 9, 12),), {}


@wide("speechbrain")
def xvector(s: Scale) -> Built:
    from speechbrain.lobes.models.Xvector import Xvector

    model = Xvector(
        in_channels=12,
        tdnn_blocks=2,
        tdnn_channels=[s(16), s(16)],
        tdnn_kernel_sizes=[3, 1],
        tdnn_dilations=[1, 1],
        lin_neurons=s(16),
    )
    return model, (normal(3, 9, 12),), {}


@wide("speechbrain")
def branchformer(s: Scale) -> Built:
    from speechbrain.lobes.models.transformer.Branchformer import BranchformerEncoder

    model = BranchformerEncoder(
        num_layers=1,
        d_model=s(32),
        nhead=4,
        kernel_size=3,
        csgu_linear_units=s(64),
        attention_type="regularMHA",
    )
    return model, (normal(3, 7, s(32)),), {}


@wide("speechbrain")
def speech_transformer(s: Scale) -> Built:
    from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder

    model = TransformerEncoder(num_layers=2, nhead=4, d_ffn=s(64), d_model=s(32))
    return model, (normal(3, 7, s(32)),), {}


@wide("encodec")
def encodec_encoder(s: Scale) -> Built:
    from encodec.modules import SEANetEncoder

    model = SEANetEncoder(
        channels=1, dimension=s(32), n_filters=s(4), n_residual_layers=1, ratios=[4, 2], lstm=1
    )
    return model, (normal(2, 1, 64),), {}


@wide("encodec")
def encodec_decoder(s: Scale) -> Built:
    from encodec.modules import SEANetDecoder

    model = SEANetDecoder(
        channels=1, dimension=s(32), n_filters=s(4), n_residual_layers=1, ratios=[4, 2], lstm=0
    )
    return model, (normal(2, s(32), 8),), {}


@wide("snac")
def snac_decoder(s: Scale) -> Built:
    from snac import SNAC

    model = SNAC(
        encoder_dim=8,
        encoder_rates=[2, 2],
        decoder_dim=16,
        decoder_rates=[2, 2],
        attn_window_size=None,
        codebook_size=12,
        codebook_dim=4,
        vq_strides=[2, 1],
    )
    return model, (normal(2, 1, 64),), {}


@wide("vocos")
def vocos_backbone(s: Scale) -> Built:
    from vocos.models import VocosBackbone

    model = VocosBackbone(input_channels=12, dim=s(32), intermediate_dim=s(64), num_layers=2)
    return model, (normal(2, 12, 9),), {}


@wide("asteroid")
def asteroid_conv_tasnet(s: Scale) -> Built:
    from asteroid.models import ConvTasNet

    model = ConvTasNet(
        n_src=2,
        n_filters=16,
        kernel_size=8,
        stride=4,
        n_blocks=2,
        n_repeats=1,
        bn_chan=8,
        hid_chan=16,
        skip_chan=8,
        sample_rate=8000,
    )
    return model, (normal(2, 1, 64),), {}


@wide("asteroid")
def dprnn(s: Scale) -> Built:
    from asteroid.masknn import DPRNN

    model = DPRNN(in_chan=16, n_src=2, bn_chan=s(16), hid_size=s(16), chunk_size=4, n_repeats=1)
    return model, (normal(2, 16, 12),), {}


@wide("demucs")
def demucs(s: Scale) -> Built:
    from demucs.demucs import Demucs

    model = Demucs(
        sources=["a", "b"],
        audio_channels=1,
        channels=8,
        depth=2,
        lstm_layers=0,
        dconv_mode=0,
        normalize=False,
        resample=False,
        rescale=0,
    )
    return model, (normal(2, 1, 256),), {}


@wide("pytorch-tcn")
def tcn(s: Scale) -> Built:
    from pytorch_tcn import TCN

    model = TCN(num_inputs=12, num_channels=[s(16), s(16)], kernel_size=3, causal=True)
    return model, (normal(2, 12, 9),), {}


@wide("braindecode", "settle")
def eegnet(s: Scale) -> Built:
    from braindecode.models import EEGNet

    return EEGNet(n_chans=4, n_outputs=3, n_times=128, sfreq=64), (normal(2, 4, 128),), {}


@wide("braindecode", "settle")
def shallow_fbcsp(s: Scale) -> Built:
    from braindecode.models import ShallowFBCSPNet

    return ShallowFBCSPNet(n_chans=4, n_outputs=3, n_times=128), (normal(2, 4, 128),), {}


@wide("braindecode", "settle")
def deep4(s: Scale) -> Built:
    from braindecode.models import Deep4Net

    return Deep4Net(n_chans=4, n_outputs=3, n_times=600), (normal(2, 4, 600),), {}


@wide("braindecode", "settle")
def eegconformer(s: Scale) -> Built:
    from braindecode.models import EEGConformer

    return EEGConformer(n_chans=4, n_outputs=3, n_times=200, sfreq=100), (normal(2, 4, 200),), {}


class Spoken(nn.Module):
    """Frames, a recurrent net, and the mean over time, as many small speech models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, width, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0].mean(1))


@wide("torch", rebuilds=True)
def spoken(s: Scale) -> Built:
    return Spoken(s(32)), (normal(3, 7, 12),), {}
