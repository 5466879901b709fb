"""A folder with two encoders: queries by the small one land where the large one would put them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from matryoshkafy.serving import ServingError, exact, fit_projection, save_router
from matryoshkafy.serving.texts import encode, load_encoder

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
WORDS = [f"w{i}" for i in range(60)]


def encoder_of(folder: Path, width: int) -> Path:
    """Write a sentence-transformers folder with a random BERT of a width."""
    from sentence_transformers.models import Normalize, Pooling, Transformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=65, hidden_size=width, num_attention_heads=2, intermediate_size=2 * width,
        num_hidden_layers=1, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(width), Normalize()]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(
        str(folder / "st"), create_model_card=False
    )
    return folder / "st"


def texts_of(count: int) -> list[str]:
    draw = torch.Generator().manual_seed(1)
    return [
        " ".join(WORDS[i] for i in torch.randint(0, 60, (6,), generator=draw)) for _ in range(count)
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_router_asks_by_the_small_and_stores_by_the_large(tmp_path: Path) -> None:
    small, large = encoder_of(tmp_path / "s", 8), encoder_of(tmp_path / "l", 32)
    texts = texts_of(40)
    by_small, by_large = (load_encoder(f).encode(texts) for f in (small, large))
    projection = fit_projection(by_small, by_large)
    save_router(tmp_path / "both", query=small, document=large, projection=projection)

    router = load_encoder(tmp_path / "both")
    queries = encode(router, texts, (8, 32), task="query")
    documents = encode(router, texts, (8, 32), task="document")
    np.testing.assert_allclose(documents.values, by_large, atol=1e-5)
    wanted = by_small @ projection
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(queries.values, wanted, atol=1e-5)
    assert exact(queries, documents, size=32, k=3).ids.shape == (40, 3)
    with pytest.raises(ServingError, match="is not empty"):
        save_router(tmp_path / "both", query=small, document=large, projection=projection)
    with pytest.raises(ServingError, match="expected a projection of the shape \\(8, 32\\)"):
        save_router(tmp_path / "none", query=small, document=large)
    with pytest.raises(ServingError, match="task='title' was given"):
        encode(router, texts, task="title")


def test_the_projection_is_the_least_squares_one() -> None:
    random = np.random.default_rng(0)
    small, way = random.normal(size=(50, 4)), random.normal(size=(4, 9))
    np.testing.assert_allclose(fit_projection(small, small @ way, ridge=0), way, atol=1e-5)
    with pytest.raises(ServingError, match="expected one row a text in both"):
        fit_projection(small[:3], small[:3] @ way)
