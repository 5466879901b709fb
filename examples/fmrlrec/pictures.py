"""Pictures: opened whole or not at all, and what `pixels` says of one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

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
