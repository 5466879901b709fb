"""Losses over all sizes at once."""

from matryoshkafy.losses.contrastive import info_nce as info_nce
from matryoshkafy.losses.distillation import Distillation as Distillation
from matryoshkafy.losses.fused import nested_cross_entropy as nested_cross_entropy
from matryoshkafy.losses.matryoshka import MatryoshkaLoss as MatryoshkaLoss
from matryoshkafy.losses.sampled import SampledMatryoshkaLoss as SampledMatryoshkaLoss
from matryoshkafy.losses.sampled import nested_sampled_softmax as nested_sampled_softmax
from matryoshkafy.outputs import Readout as Readout
from matryoshkafy.outputs import scores_of as scores_of
