"""Example inputs of the zoo: batches of 2 or 3, lengths of 5 to 7, never equal to a width."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
BATCH = 3
LENGTH = 7


def tokens(batch: int = BATCH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Draws token ids above the special ones; ends each row with the end token 2."""
    ids = torch.randint(3, vocabulary, (batch, length), generator=_generator())
    ids[:, -1] = 2
    return ids


def text(*, mask: bool, length: int = LENGTH, **more: Any) -> dict[str, Any]:
    """Gives `input_ids`, and with `mask` an attention mask whose second row is padded."""
    given: dict[str, Any] = {"input_ids": tokens(length=length)} | more
    if mask:
        given["attention_mask"] = padded(length=length)
    return given


def padded(batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    """Gives a mask of ones whose second row ends in two zeros."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def seq2seq() -> dict[str, Any]:
    """Gives source and target tokens of different lengths."""
    target = tokens(length=5)
    return text(mask=True) | {"decoder_input_ids": target, "use_cache": False}


def image(*, size: int, channels: int = 3, batch: int = 2) -> dict[str, Any]:
    """Gives `pixel_values` of shape (batch, channels, size, size)."""
    return {"pixel_values": pixels(size, channels=channels, batch=batch)}


def pixels(size: int, *, channels: int = 3, batch: int = 2) -> torch.Tensor:
    """Draws normal images of shape (batch, channels, size, size)."""
    return torch.randn(batch, channels, size, size, generator=_generator())


def image_text() -> dict[str, Any]:
    """Gives two images and three texts."""
    return text(mask=True) | image(size=32)


def speech2text() -> dict[str, Any]:
    """Gives a log-mel spectrogram of 24 frames in 10 bands, and target tokens."""
    frames = torch.randn(BATCH, 10, 24, generator=_generator())
    return {"input_features": frames, "decoder_input_ids": tokens(length=5), "use_cache": False}


def wave(samples: int = 400, batch: int = 2) -> dict[str, Any]:
    """Gives raw audio of shape (batch, samples)."""
    return {"input_values": torch.randn(batch, samples, generator=_generator())}


def normal(*shape: int) -> torch.Tensor:
    """Draws a standard normal tensor, the same one at each call."""
    return torch.randn(*shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def bands(batch: int = 2) -> dict[str, Any]:
    """Gives a spectrogram of shape (batch, 24 frames, 16 bands) as `input_values`."""
    return {"input_values": normal(batch, 24, 16)}


def features(batch: int = 2, bands: int = 10) -> dict[str, Any]:
    """Gives `input_features` of shape (batch, 24 frames, bands)."""
    return {"input_features": normal(batch, 24, bands)}


def series(batch: int = 2) -> dict[str, Any]:
    """Gives `past_values` of shape (batch, 24 steps, 5 channels)."""
    return {"past_values": normal(batch, 24, 5)}


def boxes() -> dict[str, Any]:
    """Gives tokens with a bounding box each, in coordinates up to 100."""
    corner = torch.randint(0, 50, (BATCH, LENGTH, 2), generator=_generator())
    return text(mask=True) | {"bbox": torch.cat([corner, corner + 9], -1)}


def video(batch: int = 2) -> dict[str, Any]:
    """Gives `pixel_values` of shape (batch, 4 frames, 3, 32, 32)."""
    return {"pixel_values": normal(batch, 4, 3, 32, 32)}


def trajectory() -> dict[str, Any]:
    """Gives states of 11 values, actions of 3, rewards, returns and steps."""
    steps = torch.arange(LENGTH).expand(BATCH, -1)
    scalars = normal(BATCH, LENGTH, 1)
    return {
        "states": normal(BATCH, LENGTH, 11),
        "actions": normal(BATCH, LENGTH, 3),
        "rewards": scalars,
        "returns_to_go": scalars,
        "timesteps": steps,
        "attention_mask": padded(),
    }


def regions() -> dict[str, Any]:
    """Gives tokens and 5 image regions of 2048 features with their boxes."""
    visual = {"visual_feats": normal(BATCH, 5, 2048), "visual_pos": normal(BATCH, 5, 4)}
    return text(mask=True) | visual


def noisy() -> dict[str, Any]:
    """Gives images and the noise that decides which patches are masked."""
    return image(size=32) | {"noise": normal(2, 16)}


def float_boxes() -> dict[str, Any]:
    """Gives tokens with a bounding box each, in coordinates up to 1."""
    given = boxes()
    return given | {"bbox": given["bbox"].float() / 100}


def pictured() -> dict[str, Any]:
    """Gives one text per image, with 16 places (token 96) for its patches."""
    ids = torch.cat([torch.full((2, 16), 96), tokens(2, 5, vocabulary=96)], 1)
    return {"input_ids": ids, "use_cache": False} | image(size=32)


def mels() -> dict[str, Any]:
    """Gives a log-mel spectrogram of 24 frames in 10 bands."""
    return {"input_features": normal(2, 10, 24)}


def heard() -> dict[str, Any]:
    """Gives features over 24 frames and target tokens."""
    target = {"decoder_input_ids": tokens(2, 5), "use_cache": False}
    return features() | target


def spoken() -> dict[str, Any]:
    """Gives raw audio and target tokens."""
    target = {"decoder_input_ids": tokens(2, 5), "use_cache": False}
    return wave(4000) | target


def codec() -> dict[str, Any]:
    """Gives raw audio with a channel axis."""
    return {"input_values": normal(2, 1, 1920)}


def perceived() -> dict[str, Any]:
    """Gives a preprocessed array of 7 positions with 30 features."""
    return {"inputs": normal(BATCH, LENGTH, 30)}


def pair(**more: Any) -> dict[str, Any]:
    """Gives one text per image."""
    return {"input_ids": tokens(2), "attention_mask": padded(2)} | image(size=32) | more
