"""Small models for the tests of checkpoints, export and the command line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk

CLASSES, WIDTH, WORDS = 5, 16, 40


class Tied(nn.Module):
    """Token ids to scores over a tied table; with a hidden buffer, a lifted constant and a norm."""

    scale: Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.register_buffer("seen", torch.arange(3))
        self.shift = torch.randn(width)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """ids [N, L] -> scores [N, WORDS] and the pooled hidden [N, width]."""
        x = self.embed(ids) * self.scale + self.shift
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        pooled = x.mean(1)
        return {"scores": self.head(pooled), "hidden": pooled}


class Images(nn.Module):
    """Pictures [N, 3, H, W] to scores, with batch norm (buffers that count) and a frozen stem."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.group = nn.GroupNorm(1, width)
        self.head = nn.Linear(width, CLASSES)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, CLASSES]."""
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.group(self.conv(x))
        return self.head(x.mean((2, 3)))


class Normed(nn.Module):
    """A weight-normalised linear: its statistics are those of the full width."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 6] -> [N, CLASSES]."""
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def tied_inputs() -> tuple[Tensor, ...]:
    """Token ids for Tied."""
    return (torch.randint(0, WORDS, (3, 7), generator=torch.Generator().manual_seed(1)),)


def image_inputs() -> tuple[Tensor, ...]:
    """Pictures for Images."""
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


def vector_inputs() -> tuple[Tensor, ...]:
    """Vectors for Normed."""
    return (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),)


SIZES = [4, 8, 16]
MODELS = {
    "tied": (Tied, tied_inputs),
    "images": (Images, image_inputs),
    "normed": (Normed, vector_inputs),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a seeded model in evaluation mode, and inputs for it."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model, inputs()


@cache
def converted(name: str, nesting: str) -> mk.Doll:
    """Return a doll of one of the models, one for all tests: none may change it."""
    model, inputs = build(name)
    return mk.convert(model, inputs, sizes=SIZES, nesting=nesting)


def sentence_encoder(folder: Path) -> Any:
    """Return a SentenceTransformer of six words: a BERT of width 16 without dropout, and mean
    pooling. Its encoder is written to the folder.
    """
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"one two three four five six".split()]
    vocabulary = {w: i for i, w in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=1,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.4,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return library.SentenceTransformer(str(folder), device="cpu")
