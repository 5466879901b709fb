"""Pictures as vectors: `pixels`, or any open_clip name ("MODEL:TAG", "hf-hub:...") or folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from examples.fmrlrec.config import Config, ConfigError
from examples.fmrlrec.workers import Each

PIXELS = 64
ImageEncoder = Callable[[list[Image.Image]], np.ndarray]


def open_picture(path: Path | None) -> Image.Image | str:
    """A whole picture, or why there is none: a corrupt one shows here, not in the middle of use."""
    if path is None or not os.path.exists(path):  # noqa: PTH110  Path.exists raises for long names
        return "items without picture"
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return f"corrupt picture {path.name}"


def raw_images(
    paths: list[Path | None], config: Config, each: Each
) -> tuple[np.ndarray, dict[str, int]]:
    """What the encoder says of each picture, zero where there is none, and what was wrong."""
    parts = [paths[at] for at in batches(len(paths), config.encoder_batch)]
    found = [row for part in each(_image_batch, parts, config) for row in part]
    width = next((len(row) for row in found if not isinstance(row, str)), 1)
    rows = [np.zeros(width) if isinstance(row, str) else row for row in found]
    vectors = np.array(rows, np.float32).reshape(-1, width)
    return vectors, dict(Counter(row for row in found if isinstance(row, str)))


def _image_batch(paths: list[Path | None], config: Config) -> list[np.ndarray | str]:
    """The vector of each picture, or why there is none."""
    opened = [open_picture(path) for path in paths]
    good = [image for image in opened if not isinstance(image, str)]
    vectors = iter(_encoder(config.image_encoder)(good) if good else [])
    return [image if isinstance(image, str) else next(vectors) for image in opened]


@lru_cache(maxsize=1)
def _encoder(name: str) -> ImageEncoder:
    return pixels if name == "pixels" else clip_encoder(name)


def pixels(images: list[Image.Image]) -> np.ndarray:
    """Histograms of oriented gradients and of colours in each quarter of each picture."""
    return np.stack([_pixel_vector(image) for image in images])


def _pixel_vector(image: Image.Image) -> np.ndarray:
    from skimage.feature import hog

    small = np.asarray(image.resize((PIXELS, PIXELS)), dtype=np.float32) / 255
    edges = hog(small.mean(2), orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
    halves = (slice(None, PIXELS // 2), slice(PIXELS // 2, None))
    colours = [_colours(small[rows, columns]) for rows in halves for columns in halves]
    parts = edges, np.concatenate(colours)
    return np.concatenate([part / max(np.linalg.norm(part), 1e-12) for part in parts])


def _colours(quarter: np.ndarray) -> np.ndarray:
    counts, _ = np.histogramdd(quarter.reshape(-1, 3), bins=4, range=[(0, 1)] * 3)
    return np.sqrt(counts.ravel() / counts.sum())


def clip_encoder(name: str) -> ImageEncoder:
    """The image tower of an open_clip model, given by "MODEL:TAG", hub name or folder."""
    import open_clip
    import torch

    # What open_clip returns has the type of each of its models at once.
    loaded: Any = open_clip.create_model_from_pretrained(*clip_name(name), device=device())
    model, transform = loaded

    @torch.inference_mode()
    def vectors(images: list[Image.Image]) -> np.ndarray:
        batch = torch.stack([transform(image) for image in images])
        return model.encode_image(batch.to(device()), normalize=True).float().cpu().numpy()

    model.eval()
    return vectors


def clip_name(name: str) -> tuple[str, str | None]:
    """Model and weights as open_clip takes them; `ConfigError` for a name without weights."""
    if Path(name).is_dir():
        return f"local-dir:{name}", None
    if name.startswith("hf-hub:"):
        return name, None
    model, separator, tag = name.partition(":")
    if not separator:
        raise ConfigError(
            f"image_encoder={name!r} names no weights; write MODEL:TAG (ViT-B-16-SigLIP:webli), "
            "hf-hub:..., a folder, or pixels"
        )
    return model, tag


def batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count`."""
    return [slice(start, start + size) for start in range(0, count, size)]


def device() -> str:
    """Where encoders run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
