"""matryoshkafy family for a causal language model and for pictures, against the same by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matryoshkafy_cli.main import app
from torch import Tensor
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with grouped heads and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(*words: object) -> Any:
    return CliRunner().invoke(app(), [str(word) for word in words])


def written(folder: Path) -> Path:
    """A file of random lines."""
    draw = torch.Generator().manual_seed(1)
    lines = [
        " ".join(WORDS[i] for i in torch.randint(0, 40, (9,), generator=draw)) for _ in range(200)
    ]
    path = folder / "texts.txt"
    path.write_text("\n".join(lines))
    return path


def test_a_language_model_becomes_a_family(llama: Path, tmp_path: Path) -> None:
    texts, out = written(tmp_path), tmp_path / "out"
    words = ["family", llama, "--sizes", "32,64", "--data", texts, "-o", out, "--length", 8]
    found = run(*words, "--steps", 2, "--json")
    assert found.exit_code == 0, found.output
    small, full = json.loads(found.stdout)["sizes"]
    assert full["same token"] > 0.9 and small["parameters"] < full["parameters"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out / "size-32")
    assert loaded.config.hidden_size == 32 and loaded.config.num_key_value_heads == 2
    assert (out / "size-32" / "tokenizer.json").is_file()
    assert small["perplexity"] == pytest.approx(_perplexity(loaded, texts, llama), rel=1e-4)
    assert (out / "start").is_dir() and (out / "run").is_dir()


def test_a_tied_language_model_is_untied_on_request(llama: Path, tmp_path: Path) -> None:
    """Its stream turns then, and every size holds a head beside its table."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
    tied, texts = tmp_path / "tied", written(tmp_path)
    model.save_pretrained(tied)
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tied)
    words = ["family", tied, "--sizes", "32,64", "--data", texts, "--length", 8, "--steps", 0]
    found = run(*words, "-o", tmp_path / "out", "--untie", "--json")
    assert found.exit_code == 0, found.output
    assert "rotated 1 groups" in (tmp_path / "out" / "order.txt").read_text()
    assert json.loads(found.stdout)["sizes"][1]["same token"] > 0.99
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "size-32")
    assert small.config.hidden_size == 32 and not small.config.tie_word_embeddings
    assert not torch.equal(small.lm_head.weight, small.model.embed_tokens.weight)
    again = run(*words, "-o", tmp_path / "out")
    assert again.exit_code == 2 and "was made with --untie" in again.output


def _perplexity(model: Any, texts: Path, folder: Path) -> float:
    """By the model's own loss over the stretches that the split holds out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "<end>".join(texts.read_text().splitlines())
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // 8 * 8].view(-1, 8)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    held = rows[order[: len(rows) // 5]]
    with torch.no_grad():
        return math.exp(float(model(input_ids=held, labels=held).loss))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two folders, of two colours."""
    image = pytest.importorskip("PIL.Image")
    folder, draw = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for number in range(104):
        label = ("dark", "light")[number % 2]
        (folder / label).mkdir(exist_ok=True)
        pixels = torch.randint(0, 120, (32, 32, 3), generator=draw) + 120 * (number % 2)
        image.fromarray(pixels.byte().numpy()).save(folder / label / f"{number}.png")
    return folder


def test_a_model_of_pictures_becomes_a_family(pictures: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    out = tmp_path / "out"
    words = ["family", "timm:test_vit", "--sizes", "0.5,1", "--data", pictures, "-o", out]
    found = run(*words, "--steps", 0, "--json")
    assert found.exit_code == 0, found.output
    small, full = json.loads(found.stdout)["sizes"]
    assert full["spearman"] > 0.999 and full["neighbours"] > 0.99
    assert small["parameters"] < full["parameters"] and 0 <= small["same folder"] <= 1
    loaded = timm.create_model(f"local-dir:{out / small['folder']}", pretrained=True)
    assert loaded.embed_dim == timm.create_model("test_vit").embed_dim // 2
    assert not (out / "run").exists() and (out / "start").is_dir()


def test_nearest_alike_counts_by_hand() -> None:
    from matryoshkafy_cli.family_images import nearest_alike

    found: Tensor = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]])
    assert nearest_alike(found, ["a", "a", "b", "b"]) == 1.0
    assert nearest_alike(found, ["a", "b", "b", "b"]) == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timm:test_vit", "--data", "nowhere"], "expected a folder of pictures"),
        (["timm:test_vit", "--data", ".", "--task", "a:b"], "expected it with a text encoder"),
        (["nowhere", "--data", "x.txt", "--weights", "w"], "expected it with timm"),
        (["nowhere", "--data", "x.txt", "--task", "a:b"], "expected QUERY:DOCUMENT"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    found = run("family", *words, "--sizes", "0.5,1", "-o", tmp_path / "out")
    assert found.exit_code == 2 and message in " ".join(found.output.split()), found.output
