"""matryoshkafy retrieve and cascade: thin over the library, clear where something does not fit."""

from __future__ import annotations

import json

import numpy as np
import polars
import pytest
from matryoshkafy_cli.main import app
from safetensors.numpy import save_file
from typer.testing import CliRunner

from matryoshkafy.serving import fit_cascade

WORDS = "red green blue round square soft hard sweet sour apple stone ball box lemon cloud".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder that adds up a vector per word, and a table of texts."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("serving")
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).normal(size=(len(WORDS) + 1, 64)).astype(np.float32)
    encoder = SentenceTransformer(modules=[StaticEmbedding(tokenizer, weights)], device="cpu")
    encoder.save(str(folder / "encoder"))
    random = np.random.default_rng(1)
    documents = [" ".join(random.permutation(WORDS)[:5]) for _ in range(120)]
    asked = [" ".join(text.split()[:4]) for text in documents]
    polars.DataFrame({"text": documents, "asked": asked}).write_parquet(folder / "t.parquet")
    return folder


def run(*words):
    return CliRunner().invoke(app(), [str(word) for word in words])


def retrieve(place, *words):
    needed = ["--encoder", place / "encoder", "--vectors", place / "v.safetensors"]
    return run("retrieve", place / "t.parquet", *needed, *words)


def test_a_text_finds_itself(place) -> None:
    texts = polars.read_parquet(place / "t.parquet")["text"].to_list()
    result = retrieve(place, "--query", texts[7], "--stages", "16:40,64:3", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["queries"]
    assert set(found["rows"][0]["text"].split()) == set(texts[7].split())
    assert found["rows"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(found["rows"]) == 3
    shown = retrieve(place, "--query", texts[7], "--query", "red ball")
    assert texts[7] in shown.stdout and "red ball" in shown.stdout


def test_stages_are_chosen(place) -> None:
    result = retrieve(place, "--tune", "asked", "--k", "3", "--json", "--budget", str(120 * 64))
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    recalls = [s["recall"] for s in settings]
    assert recalls == sorted(recalls) and recalls[-1] > 0.9
    assert max(s["products"] for s in settings) <= 120 * 64
    result = retrieve(place, "--tune", "asked", "--k", "3", "--report", place / "page.html")
    assert result.exit_code == 0, result.output
    assert "recall and MRR against multiply-adds" in (place / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --query TEXT to search, or --tune COLUMN"),
        (["--query", "red", "--stages", "16"], "expected size:kept pairs"),
        (["--query", "red", "--stages", "17:3"], "these vectors have the sizes 16, 32, 64"),
        (["--query", "red", "--text", "nowhere"], "cannot be read as a parquet table"),
    ],
)
def test_what_does_not_fit_is_said(place, words, message: str) -> None:
    result = retrieve(place, *words)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["a ball", None, "a box"], "row 1 has no text"), ([], "has no rows")],
)
def test_texts_that_are_missing_are_refused(tmp_path, texts, message: str) -> None:
    path = tmp_path / "t.parquet"
    polars.DataFrame({"text": texts}, schema={"text": polars.String}).write_parquet(path)
    nothing = ["--encoder", tmp_path, "--vectors", tmp_path / "v.safetensors"]
    result = run("retrieve", path, *nothing, "--query", "ball")
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_vectors_of_other_texts_are_refused(place, tmp_path) -> None:
    retrieve(place, "--query", "red")
    polars.DataFrame({"text": ["red apple"]}).write_parquet(tmp_path / "t.parquet")
    needed = ["--encoder", place / "encoder", "--vectors", place / "v.safetensors"]
    result = run("retrieve", tmp_path / "t.parquet", *needed, "--query", "red")
    assert result.exit_code == 2
    assert "holds 120 vectors" in result.output and "expected 1 of" in result.output
    result = run("retrieve", tmp_path / "t.parquet", *needed[2:], "--encoder", tmp_path,
                 "--query", "red")  # fmt: skip
    assert result.exit_code == 2 and "no sentence-transformers folder" in result.output


def logits(path, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, size=300)
    clean = 2 * np.eye(4)[labels]
    found = {str(s): clean + random.normal(size=(300, 4)) * 4 / s for s in (2, 4, 8)}
    save_file(found | {"labels": labels}, path)
    return found, labels


def test_a_cascade_says_what_it_costs(tmp_path) -> None:
    found, labels = logits(tmp_path / "valid.safetensors", 0)
    result = run("cascade", tmp_path / "valid.safetensors", "--shared", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    sized = {int(name): value for name, value in found.items()}
    full = float((sized[8].argmax(1) == labels).mean())
    # Halfway from the cost of size 2 to that of size 8.
    wanted = fit_cascade(sized, labels, budget=0.625, shared=True).route(sized)
    assert (said["accuracy"], said["cost"]) == (wanted.accuracy(labels), wanted.cost)
    assert said["cost_share"] <= 0.625
    kept = run("cascade", tmp_path / "valid.safetensors", "--floor", full - 0.05, "--json")
    assert json.loads(kept.stdout)["accuracy"] >= full - 0.05
    logits(tmp_path / "test.safetensors", 1)
    shown = run("cascade", tmp_path / "valid.safetensors", "--test", tmp_path / "test.safetensors")
    assert "of the largest size's cost" in shown.stdout


def test_a_cascade_is_drawn(tmp_path) -> None:
    logits(tmp_path / "valid.safetensors", 0)
    result = run("cascade", tmp_path / "valid.safetensors", "--report", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "accuracy against mean cost" in page and page.count("<circle") == 4
    assert 'type="radio"' not in page


def test_logits_that_are_none_are_refused(tmp_path) -> None:
    save_file({"a": np.ones((2, 2))}, tmp_path / "bad.safetensors")
    result = run("cascade", tmp_path / "bad.safetensors")
    assert result.exit_code == 2 and "expected `labels` and tensors named" in result.output
    logits(tmp_path / "valid.safetensors", 0)
    result = run("cascade", tmp_path / "valid.safetensors", "--costs", "1,x")
    assert result.exit_code == 2 and "expected numbers such as 1,4,16" in result.output
