"""What is known of models of other libraries: fitting inputs, caches, whether they are trained.

Nothing is imported: a model says what it is by its attributes and by the module of its class.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from matryoshkafy.errors import TraceError

# The configuration of a transformers model: its fields differ from family to family.
Config = Any
BATCH, LENGTH = 2, 8
TEXTS = ("A text.", "Another text, which is somewhat longer than the first one.")
LIBRARIES = ("transformers", "sentence_transformers", "timm", "torchvision", "open_clip")


def made_inputs(model: nn.Module) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return random (args, kwargs) for a model of transformers, sentence-transformers or timm.

    Raises:
        TraceError: the model is of another kind and its forward needs inputs.
    """
    if is_sentence_transformer(model):
        read: Any = getattr(model, "preprocess", None) or model.tokenize
        return (dict(read(list(TEXTS))),), {}
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        return (), dict(_tokens(model.config, _wanted(model)))
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and "input_size" in cfg:
        return (normal(BATCH, *cast("Sequence[int]", cfg["input_size"])),), {}
    needed = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise TraceError(
            f"no example inputs were given, and for a {type(model).__name__} none can be made; "
            f"its forward needs {', '.join(needed)}. Give a tensor, a tuple, or a mapping by name."
        )
    return (), {}


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether a model reads texts and returns embeddings, with a tokenizer of its own."""
    known = type(model).__module__.partition(".")[0] == "sentence_transformers"
    return known and hasattr(model, "tokenize")


def _configs(model: nn.Module) -> list[Config]:
    """The configs of the transformers models inside, outermost first."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if hasattr(c, "model_type")}.values())


def _wanted(model: Any) -> list[str]:
    """The main input, what a tokenizer gives beside it, and what the other tower or the decoder
    reads, as far as the forward takes them.
    """
    wanted = [model.main_input_name]
    if hasattr(model.config, "text_config") and hasattr(model.config, "vision_config"):
        wanted += ["input_ids", "pixel_values"]
    if "input_ids" in wanted:
        wanted += ["attention_mask", "token_type_ids"]
    if getattr(model.config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    known = inspect.signature(model.forward).parameters
    return [name for name in dict.fromkeys(wanted) if name in known]


def _tokens(config: Config, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        if name not in MAKERS:
            raise TraceError(
                f"no example inputs were given, and none can be made for {name!r}, the input of "
                f"a {config.model_type} model; give them: convert(model, {{{name!r}: ...}})"
            )
        yield name, MAKERS[name](config)


def _ids(config: Config) -> Tensor:
    words = getattr(config.get_text_config(), "vocab_size", 100)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, words - 1), words, (BATCH, LENGTH), generator=draw)


def _pixels(config: Config) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size: int | Sequence[int] = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return normal(BATCH, getattr(vision, "num_channels", 3), height, width)


def _wave(config: Config) -> Tensor:
    bins = getattr(config, "num_mel_bins", None)
    return normal(BATCH, config.max_length, bins) if bins else normal(BATCH, 4000)


def _features(config: Config) -> Tensor:
    length = 2 * getattr(config, "max_source_positions", 100)
    return normal(BATCH, getattr(config, "num_mel_bins", 80), length)


def normal(*shape: int) -> Tensor:
    """Return random numbers that are the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MAKERS: dict[str, Callable[[Config], Tensor]] = {
    "input_ids": _ids,
    "attention_mask": lambda _: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "token_type_ids": lambda _: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _wave,
    "input_features": _features,
}


@contextlib.contextmanager
def caches_off(model: nn.Module) -> Generator[None, None, None]:
    """A cache among the outputs cannot be traced: transformers leaves it out, then goes on."""
    configs = [c for c in _configs(model) if getattr(c, "use_cache", False)]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


def loaded_by(model: nn.Module) -> str | None:
    """Return how one knows that a library loaded trained weights into a model, else None."""
    if was_loaded(model):
        return "its weights were loaded by from_pretrained"
    library = type(model).__module__.partition(".")[0]
    gain = trained_norm(model) if library in LIBRARIES else None
    return None if gain is None else f"it is a model of {library} whose norms are trained ({gain})"


def was_loaded(model: nn.Module) -> bool:
    """Tell whether transformers read the weights from a checkpoint: it marks those, and nothing
    that it initialised.
    """
    return any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())


def trained_norm(model: nn.Module) -> str | None:
    """Return the name of a norm's gain that training has moved: fresh ones are all alike.

    Training moves them all. Where most of them are alike, the others were initialised so.
    """
    gains = dict(_gains(model))
    moved = [name for name, gain in gains.items() if bool((gain != gain[0]).any())]
    return moved[0] if 2 * len(moved) > len(gains) else None


# Above the edge of what independent entries give; small matrices scatter around it.
SPIKE = 1.15
EXAMINED = 16


def has_spikes(model: nn.Module) -> bool:
    """Tell whether most linears have a direction that no random matrix of their size has.

    The largest singular value of independent entries is about s (sqrt(out) + sqrt(in)), s their
    standard deviation; what training writes stands out of it (Marchenko and Pastur 1967; Martin and
    Mahoney, Journal of Machine Learning Research 22, 2021).
    """
    weights = islice((w for w in map(_linear, model.modules()) if w is not None), EXAMINED)
    found = [_largest(w) > SPIKE for w in weights]
    return 2 * sum(found) > len(found)


def _linear(module: nn.Module) -> Tensor | None:
    """Return the weight of a linear that is large enough to tell, in single precision."""
    if not isinstance(module, nn.Linear) or module.weight.is_meta or min(module.weight.shape) < 8:
        return None
    return module.weight.detach().float()


def _largest(weight: Tensor) -> float:
    """Return the largest singular value, by power iteration, over what random entries give."""
    centred = weight - weight.mean()
    edge = centred.std() * (len(weight) ** 0.5 + weight.shape[1] ** 0.5)
    draw = torch.Generator().manual_seed(0)
    at = torch.randn(weight.shape[1], generator=draw, dtype=torch.float32, device="cpu").to(weight)
    for _ in range(12):
        at = nn.functional.normalize(centred.T @ (centred @ at), dim=0)
    return ((centred @ at).square().sum().sqrt() / edge).item() if edge > 0 else 0.0


def _gains(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    for name, module in modules:
        gain = getattr(module, "weight", None)
        named = "norm" in type(module).__name__.lower()
        if named and isinstance(gain, Tensor) and gain.ndim == 1 < len(gain) and not gain.is_meta:
            yield f"{name}.weight", gain
