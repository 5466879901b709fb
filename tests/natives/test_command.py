"""matryoshkafy slice --to: from a folder to stock folders, by the command line alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matryoshkafy_cli.main import app
from typer.testing import CliRunner

from matryoshkafy.natives.sentences import encoder_of as encoder_in
from tests.natives.test_saving import llama

__all__ = ["llama"]
pytestmark = pytest.mark.filterwarnings("ignore")


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app(), list(map(str, words)))
    return result.exit_code, result.stdout + result.stderr


def test_from_a_folder_to_folders(llama: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kept, out = tmp_path / "doll", tmp_path / "out"
    code, text = run("convert", llama, "--sizes", "16,32,64", "--nesting", "sliced", "-o", kept)
    assert code == 0, text
    code, text = run("slice", kept, "--size", 16, "--size", 32, "--to", "hf", "-o", out)
    assert code == 0, text
    for size in (16, 32):
        model = transformers.AutoModelForCausalLM.from_pretrained(out / str(size))
        assert model.config.hidden_size == size
        assert (out / str(size) / "LICENSE").read_text() == "terms"
    code, text = run("slice", kept, "--size", 16, "--to", "hf", "-o", out / "16")
    assert code == 2
    assert "not empty" in text
    code, text = run("slice", kept, "--size", 16, "--to", "torchscript", "-o", tmp_path / "x")
    assert code == 2
    assert "expected one of hf, st, timm" in text
    assert not (tmp_path / "x").exists()


def test_a_class_needs_its_builder(tmp_path: Path) -> None:
    model = "tests.natives.built:model"
    kept, out = tmp_path / "doll", tmp_path / "out"
    code, text = run("convert", model, "--sizes", "16,32", "--nesting", "sliced", "-o", kept)
    assert code == 0, text
    code, text = run("slice", kept, "--size", 16, "--to", "class", "-o", out)
    assert code == 2
    assert "--class tests.natives.built:model" in text
    words = ("slice", kept, "--size", 16, "--to", "class", "-o", out, "--class")
    code, text = run(*words, "tests.natives.nowhere:build")
    assert code == 2
    assert "cannot be imported" in text
    code, text = run(*words, "tests.natives.test_native:Net")
    assert code == 0, text
    assert (out / "native.json").is_file()


def test_a_folder_of_sentence_transformers_becomes_folders_that_encode(tmp_path: Path) -> None:
    """The doll is of all its modules, the folders are of its encoder with the modules behind it."""
    sentences = pytest.importorskip("sentence_transformers")
    from tests.serving.test_router import encoder_of, texts_of

    original, kept, out = encoder_of(tmp_path, 16), tmp_path / "doll", tmp_path / "out"
    code, text = run("convert", original, "--sizes", "8,16", "--nesting", "sliced", "-o", kept)
    assert code == 0, text
    code, text = run("slice", kept, "--all", "--to", "st", "-o", out)
    assert code == 0, text
    texts = texts_of(3)
    full = sentences.SentenceTransformer(str(original), device="cpu").encode(texts)
    found = {s: sentences.SentenceTransformer(str(out / str(s)), device="cpu") for s in (8, 16)}
    np.testing.assert_allclose(found[16].encode(texts), full, atol=1e-6)
    assert found[8].encode(texts).shape == (3, 8)
    words, whole = (
        encoder_in(m).get_parameter("embeddings.word_embeddings.weight")
        for m in (found[8], sentences.SentenceTransformer(str(original), device="cpu"))
    )
    assert torch.equal(words, whole[:, :8])
    code, text = run("pack", kept, "--to", "st", "-o", tmp_path / "packed")
    assert code == 2
    assert "whole SentenceTransformer" in text
