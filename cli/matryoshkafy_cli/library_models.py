"""timm:NAME and open_clip:NAME have random weights; a tag behind the name loads trained ones.

timm:NAME:pretrained and open_clip:NAME:TAG ask the library, which may download them.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Any

import torch

from matryoshkafy.dolls.libraries import BATCH, normal
from matryoshkafy_cli.loaded import RANDOM, Loaded
from matryoshkafy_cli.screen import CommandError


def from_timm(name: str) -> Loaded:
    """Return a timm model and a batch of images."""
    timm = _library("timm", "timm")
    name, _, tag = name.partition(":")
    _check_name("timm", name, timm.list_models())
    _check_tag(f"timm:{name}", tag, ["pretrained"])
    model = _made("timm", name, lambda: timm.create_model(name, pretrained=bool(tag)))
    images = normal(BATCH, *model.pretrained_cfg.get("input_size", (3, 224, 224)))
    return Loaded(model, (images,), weights=tag or RANDOM)


def from_open_clip(name: str) -> Loaded:
    """Return an open_clip model with both towers, images and token ids."""
    open_clip = _library("open_clip", "open_clip_torch")
    name, _, tag = name.partition(":")
    _check_name("open_clip", name, open_clip.list_models())
    _check_tag(f"open_clip:{name}", tag, open_clip.list_pretrained_tags_by_model(name))
    model = _made("open_clip", name, lambda: open_clip.create_model(name, pretrained=tag or None))
    text = open_clip.get_model_config(name).get("text_cfg", {})
    size = model.visual.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return Loaded(model, (normal(BATCH, 3, height, width), _tokens(text)), weights=tag or RANDOM)


def _tokens(text: dict[str, Any]) -> torch.Tensor:
    words, length = text.get("vocab_size", 49408), text.get("context_length", 77)
    ids = torch.randint(1, words - 1, (BATCH, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = words - 1
    return ids


def _library(name: str, package: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise CommandError(
            f"{name}:NAME was given, but {name} is not installed: pip install {package}"
        )
    return importlib.import_module(name)


def _check_name(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise CommandError(
            f"{library}:{name} was given, but {library} knows no such model; expected one of its "
            f"{len(known)} names. Close to it: {', '.join(near)}."
        )


def _check_tag(name: str, tag: str, known: list[str]) -> None:
    if tag and tag not in known:
        raise CommandError(
            f"{name}:{tag} was given; expected no tag (random weights), or one of "
            f"{', '.join(known) or 'none: this model has no trained weights'}."
        )


def _made(library: str, name: str, make: Any) -> Any:
    try:
        return make()
    except Exception as error:  # noqa: BLE001  the libraries raise errors of every kind
        raise CommandError(
            f"{library}:{name} cannot be built: {type(error).__name__}: {str(error)[:300]}\n"
            "Expected a model that is built from its config alone. Choose another, or write a "
            "model.py."
        ) from error
