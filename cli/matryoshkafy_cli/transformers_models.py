"""A local transformers folder: config.json and safetensors, never remote code, never pickle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matryoshkafy_cli.loaded import Loaded
from matryoshkafy_cli.screen import CommandError

LENGTH = 8
BATCH = 2


def from_folder(folder: Path) -> Loaded:
    """Return the model of a folder, in the class that its config names, and inputs for it."""
    if importlib.util.find_spec("transformers") is None:
        raise CommandError(
            f"{folder} is a transformers folder, but transformers is not installed: "
            "pip install 'matryoshkafy[hf]'"
        )
    try:
        model = _build(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CommandError(
            f"{folder} cannot be loaded by transformers: {str(error).strip()[:400]}\nExpected a "
            "config.json of a known architecture and its weights as safetensors. Save the model "
            "again with save_pretrained."
        ) from error
    return Loaded(model, (), dict(_inputs(model)))


def _build(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    name = (config.architectures or [""])[0]
    maker: Any = getattr(transformers, name, transformers.AutoModel)
    if any(folder.glob("*.safetensors")):
        model = maker.from_pretrained(folder, config=config, use_safetensors=True, **local)
    else:
        _refuse_pickle(folder)
        model = maker.from_config(config) if name == "" else maker(config)
    _forget_caches(model)
    return model


def _forget_caches(model: Any) -> None:
    """A cache among the outputs cannot be traced; every part has a config of its own."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _refuse_pickle(folder: Path) -> None:
    pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))
    if pickles:
        raise ValueError(f"{pickles[0]} is a pickle, which is not read")


def _inputs(model: Any) -> Iterator[tuple[str, Any]]:
    import inspect

    known = inspect.signature(model.forward).parameters
    for name in _wanted(model):
        if name in known:
            yield name, MAKERS[name](model.config)


def _wanted(model: Any) -> list[str]:
    """The main input, its mask where it is text, and what the other tower or the decoder reads."""
    wanted = [model.main_input_name]
    if hasattr(model.config, "text_config") and hasattr(model.config, "vision_config"):
        wanted += ["input_ids", "pixel_values"]
    if "input_ids" in wanted:
        wanted.append("attention_mask")
    if getattr(model.config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    return [name for name in dict.fromkeys(wanted) if name in MAKERS]


def _ids(config: Any) -> Any:
    import torch

    words = getattr(config.get_text_config(), "vocab_size", 100)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, words - 1), words, (BATCH, LENGTH), generator=draw)


def _mask(config: Any) -> Any:
    import torch

    return torch.ones(BATCH, LENGTH, dtype=torch.long)


def _pixels(config: Any) -> Any:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _normal(BATCH, getattr(vision, "num_channels", 3), height, width)


def _wave(config: Any) -> Any:
    bins = getattr(config, "num_mel_bins", None)
    return _normal(BATCH, config.max_length, bins) if bins else _normal(BATCH, 4000)


def _features(config: Any) -> Any:
    length = 2 * getattr(config, "max_source_positions", 100)
    return _normal(BATCH, getattr(config, "num_mel_bins", 80), length)


def _normal(*shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MAKERS: dict[str, Callable[[Any], Any]] = {
    "input_ids": _ids,
    "attention_mask": _mask,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _wave,
    "input_features": _features,
}
