"""Pictures: opened whole or not at all, and what `pixels` or a model of open_clip says of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from examples.fmrlrec.workers import device

SIDE = 64


def open_picture(path: Path | None) -> Image.Image | str:
    """A whole picture, or why there is none: a corrupt one shows here, not in the middle of use."""
    if path is None or not os.path.exists(path):  # noqa: PTH110  Path.exists raises for long names
        return "items without picture"
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return f"corrupt picture {path.name}"


def clip_name(name: str) -> str:
    """An image encoder as open_clip takes it: "MODEL:TAG", "hf-hub:..." or a folder; else ""."""
    if (Path(name) / "open_clip_config.json").is_file():
        return f"local-dir:{name}"
    return name if ":" in name else ""


@lru_cache(maxsize=1)
def clip_encoder(name: str) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """The image tower of an open_clip model, by what `clip_name` gave: images -> unit vectors."""
    import open_clip

    schema = name.startswith(("local-dir:", "hf-hub:"))
    model, _, tag = (name, "", None) if schema else name.partition(":")
    made: Any = open_clip.create_model_from_pretrained(model, tag, device=device())
    tower, transform = made[0].eval(), made[1]

    @torch.inference_mode()
    def vectors(images: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.stack([transform(image) for image in images]).to(device())
        return tower.encode_image(batch, normalize=True).float().cpu().numpy()

    return vectors


def pixels(image: Image.Image) -> np.ndarray:
    """Histograms of oriented gradients, and of colours in each quarter, of equal weight."""
    from skimage.feature import hog

    small = np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32) / 255
    edges = hog(small.mean(2), orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
    halves = slice(None, SIDE // 2), slice(SIDE // 2, None)
    colours = [_colours(small[rows, columns]) for rows in halves for columns in halves]
    parts = edges, np.concatenate(colours)
    return np.concatenate([part / max(np.linalg.norm(part), 1e-12) for part in parts])


def _colours(quarter: np.ndarray) -> np.ndarray:
    counts, _ = np.histogramdd(quarter.reshape(-1, 3), bins=4, range=[(0, 1)] * 3)
    return np.sqrt(counts.ravel() / counts.sum())
