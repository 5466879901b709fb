"""One frozen configuration; `sizes` is the dial and the rest has the paper's defaults.

What can go wrong in the recommender has its errors here, told so that a person can mend it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import whole_file

if TYPE_CHECKING:
    from examples.fmrlrec.formats import Survey

# Which features of the items each modality uses.
MODALITIES = {"both": ("text", "image"), "text": ("text",), "image": ("image",), "id": ()}


class DataError(MatryoshkafyError):
    """Interactions or items that cannot be read or that leave nothing to learn from."""


class ConfigError(MatryoshkafyError):
    """A setting that does not exist or does not fit."""


class RunError(MatryoshkafyError):
    """A run folder that lacks what a command needs, or that belongs to another configuration."""


class Config(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Everything that a run depends on; the run folder keeps it as `config.json`.

    The defaults are those of arXiv 2409.16627. Of what does not say itself: `data` is "synthetic",
    a folder or a file (see `formats`). `sizes` is a ladder as matryoshkafy reads it; its last rung
    is the width of the model. `workers` of Ray prepare and encode, 0 for this process. `weights`
    belong to the sizes by share of the width: "1/32:10,1/4:4,1:2" fits every ladder; a size learns
    at one step of as many as `every` says, written in the same way. `learn_scales` gives the scores
    of each size a scale of its own, which starts at `score_scale` / size, or at 1 where that is 0.
    `negatives` items drawn at each step stand for all others in the loss (sampled softmax); with 0
    all are scored. `warmup` counts steps, `patience` epochs; `schedule` is what follows the
    warm-up. `precision` "auto" is bf16 on a GPU and full elsewhere. `alone` makes `run` compare.
    """

    data: str = "synthetic"
    sizes: str = "8..1024"
    seed: NonNegativeInt = 0

    min_count: PositiveInt = 5
    max_length: Annotated[int, Field(ge=2)] = 50
    unknown_items: Literal["drop", "keep"] = "drop"
    windows: Literal["all", "last"] = "last"
    partition_rows: PositiveInt = 4_000_000
    workers: NonNegativeInt = 0

    modality: Literal["both", "text", "image", "id"] = "both"
    text_encoder: str = "tfidf"
    image_encoder: str = "pixels"
    encoder_size: PositiveInt = 256
    encoder_batch: PositiveInt = 64
    trainable_features: bool = False

    blocks: PositiveInt = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    r_min: Annotated[float, Field(ge=0, le=0.9)] = 0.0

    nesting: Literal["masked", "sliced"] = "masked"
    norm: Literal["block", "prefix"] = "prefix"
    weights: str = ""
    every: str = ""
    learn_scales: bool = False
    score_scale: NonNegativeFloat = 0.0
    negatives: NonNegativeInt = 0

    epochs: PositiveInt = 500
    batch: PositiveInt = 32
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-2
    clip: PositiveFloat = 5.0
    warmup: NonNegativeInt = 100
    schedule: Literal["constant", "cosine"] = "constant"
    precision: Literal["auto", "full", "bf16"] = "auto"
    patience: PositiveInt = 10
    select_by: Literal["largest", "mean"] = "largest"
    checkpoint_steps: NonNegativeInt = 500
    eval_batch: PositiveInt = 256
    alone: bool = False

    @staticmethod
    def from_json(text: str) -> Config:
        """Reads a `config.json`; an unknown setting is an error that names it."""
        return replace(Config(), json.loads(text))


SMALL = 50_000  # interactions: a shop below trains in minutes at any setting
PRESETS: dict[str, dict[str, Any]] = {
    # The published settings, which are the defaults, and scores that start small at any width.
    "paper": {"learn_scales": True, "score_scale": 16.0},
    # The embedded shop trains within minutes on two CPU cores.
    "synthetic": {
        "sizes": "8..64", "encoder_size": 64, "dropout": 0.2, "batch": 64, "lr": 2e-3,
        "epochs": 12, "patience": 4, "warmup": 50, "windows": "all", "schedule": "cosine",
        "learn_scales": True, "score_scale": 64.0,
    },
    # Ids alone: the recipe of LRURec, and weights and scales that let its small sizes learn.
    "beauty": {
        "sizes": "8..64", "modality": "id", "batch": 128, "dropout": 0.5, "windows": "all",
        "r_min": 0.8, "nesting": "sliced", "weights": "1/8:4,1/4:2,1:1",
        "learn_scales": True, "score_scale": 64.0, "lr": 2e-3, "epochs": 30, "schedule": "cosine",
    },
    # Text and posters at a width that two CPU cores train within hours.
    "ml-1m": {
        "sizes": "8..256", "text_encoder": "minilm", "trainable_features": True, "dropout": 0.2,
        "nesting": "sliced", "weights": "1/32:10,1/4:4,1:2", "every": "1/2:1,1:2",
        "learn_scales": True, "score_scale": 16.0,
        "lr": 6e-3, "epochs": 36, "schedule": "cosine", "select_by": "mean",
    },
}  # fmt: skip


def own(survey: Survey, *, gpu: bool, minilm: bool) -> dict[str, Any]:
    """Settings for a shop of one's own, by its size and by what is known of its items.

    A small shop keeps every user and item: the 5-core of a few hundred users may be empty.
    """
    chosen = {"modality": survey.modality}
    if survey.interactions < SMALL:
        return {**PRESETS["synthetic"], "epochs": 20, "min_count": 1, **chosen}
    if gpu:
        return {**PRESETS["paper"], **chosen}
    if survey.modality == "id":
        return PRESETS["beauty"]
    return {**PRESETS["ml-1m"], "text_encoder": "minilm" if minilm else "tfidf", **chosen}


def preset(name: str) -> Config:
    """Returns the configuration called `name`; the table `PRESETS` lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return replace(Config(), PRESETS[name])


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns `config` with `changes`, each converted to its setting's type."""
    for name in changes:
        if name not in Config.model_fields:
            names = ", ".join(Config.model_fields)
            raise ConfigError(f"no setting {name!r}; the settings are {names}")
    try:
        return Config(**{**config.model_dump(), **changes})
    except pydantic.ValidationError as error:
        told = "; ".join(f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{told}. Change it with --set NAME=VALUE") from error


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Reads `name=value` texts as given on the command line."""
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r} has no '='; write --set name=value")
    split = (pair.split("=", 1) for pair in pairs)
    return {name.strip(): value.strip() for name, value in split}


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a killed process leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
