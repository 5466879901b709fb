"""One frozen configuration; `sizes` is the dial and the rest has the paper's defaults.

What can go wrong in the recommender has its errors here, told so that a person can mend it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import whole_file

# Which features of the items each modality uses.
MODALITIES = {"both": ("text", "image"), "text": ("text",), "image": ("image",), "id": ()}
CHOICES = {
    "modality": tuple(MODALITIES),
    "windows": ("all", "last"),
    "unknown_items": ("drop", "keep"),
    "nesting": ("masked", "sliced"),
    "norm": ("block", "prefix"),
    "select_by": ("largest", "mean"),
    "schedule": ("constant", "cosine"),
    "precision": ("auto", "full", "bf16"),
}
# The smallest number that makes sense, and the largest.
LIMITS = {
    "dropout": (0, 0.99), "r_min": (0, 0.9), "lr": (1e-12, 1e3), "clip": (1e-12, 1e12),
    **dict.fromkeys(("min_count", "encoder_size", "encoder_batch", "blocks", "epochs", "batch",
                     "partition_rows", "eval_batch", "patience"), (1, 1e12)),
    **dict.fromkeys(("seed", "workers", "score_scale", "weight_decay", "warmup",
                     "checkpoint_steps"), (0, 1e12)),
    "max_length": (2, 1e6),
}  # fmt: skip


class DataError(MatryoshkafyError):
    """Interactions or items that cannot be read or that leave nothing to learn from."""


class ConfigError(MatryoshkafyError):
    """A setting that does not exist or does not fit."""


class RunError(MatryoshkafyError):
    """A run folder that lacks what a command needs, or that belongs to another configuration."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; the run folder keeps it as `config.json`.

    The defaults are those of arXiv 2409.16627. Of what does not say itself: `data` is "synthetic",
    a folder or a file (see `formats`). `sizes` is a ladder as matryoshkafy reads it; its last rung
    is the width of the model. `workers` of Ray prepare and encode, 0 for this process. `weights`
    belong to the sizes by share of the width: "1/32:10,1/4:4,1:2" fits every ladder; a size learns
    at one step of as many as `every` says, written in the same way. `warmup` counts steps,
    `patience` epochs; `schedule` is what follows the warm-up. `precision` "auto" is bf16 on a GPU
    and full elsewhere. `learn_scales` gives the scores of each size a scale of its own, which
    starts at `score_scale` / size, or at 1 where that is 0. `alone` makes `run` compare, too.
    """

    data: str = "synthetic"
    sizes: str = "8..1024"
    seed: int = 0

    min_count: int = 5
    max_length: int = 50
    unknown_items: str = "drop"
    windows: str = "last"
    partition_rows: int = 4_000_000
    workers: int = 0

    modality: str = "both"
    text_encoder: str = "tfidf"
    image_encoder: str = "pixels"
    encoder_size: int = 256
    encoder_batch: int = 64
    trainable_features: bool = False

    blocks: int = 2
    dropout: float = 0.5
    r_min: float = 0.0

    nesting: str = "masked"
    norm: str = "prefix"
    weights: str = ""
    every: str = ""
    learn_scales: bool = False
    score_scale: float = 0.0

    epochs: int = 500
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 5.0
    warmup: int = 100
    schedule: str = "constant"
    precision: str = "auto"
    patience: int = 10
    select_by: str = "largest"
    checkpoint_steps: int = 500
    eval_batch: int = 256
    alone: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}, expected one of {', '.join(allowed)}; "
                    f"set it with --set {name}={allowed[0]}"
                )
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)!r}, expected {least:g} to {most:g}")

    def to_json(self) -> str:
        """Writes the configuration as JSON text, one setting a line."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """Reads what `to_json` wrote; an unknown setting is an error that names it."""
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
    # Ids alone: the recipe of LRURec, and a learning rate that falls.
    "beauty": {
        "sizes": "8..64", "modality": "id", "batch": 128, "dropout": 0.5, "windows": "all",
        "r_min": 0.8, "epochs": 40, "schedule": "cosine",
    },
    # Text and posters at a width that two CPU cores train within hours.
    "ml-1m": {
        "sizes": "8..256", "text_encoder": "minilm", "trainable_features": True, "dropout": 0.2,
        "nesting": "sliced", "weights": "1/32:10,1/4:4,1:2", "every": "1/2:1,1:2",
        "learn_scales": True, "score_scale": 16.0,
        "lr": 6e-3, "epochs": 36, "schedule": "cosine", "select_by": "mean",
    },
}  # fmt: skip


def own(survey: Any, *, gpu: bool, minilm: bool) -> dict[str, Any]:
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


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """Returns `config` with `changes`, each converted to its setting's type."""
    known = {field.name: type(field.default) for field in dataclasses.fields(Config)}
    for name in changes:
        if name not in known:
            raise ConfigError(f"no setting {name!r}; the settings are {', '.join(known)}")
    typed = {name: _typed(name, value, known[name]) for name, value in changes.items()}
    return dataclasses.replace(config, **typed)


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Reads `name=value` texts as given on the command line."""
    settings = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set {pair!r} has no '='; write --set name=value")
        settings[name.strip()] = value.strip()
    return settings


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a killed process leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _typed(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    try:
        return TRUTHS[str(value).lower()] if kind is bool else kind(value)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}={value!r} is not a {kind.__name__}") from error
