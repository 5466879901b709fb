"""matryoshkafy family: a tiny text encoder becomes folders of its own class; a rerun resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from matryoshkafy_cli.main import app
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers with a BERT of width 32."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    vocabulary = {w: i for i, w in enumerate((folder / "vocab.txt").read_text().split("\n"))}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=65,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=32,
        initializer_range=0.4,  # attention that is not uniform, so that heads can be told apart
    )
    transformers.BertModel(config).save_pretrained(folder)
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    lines = [
        " ".join(WORDS[i] for i in torch.randint(0, 60, (6,), generator=draw)) for _ in range(150)
    ]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(lines))
    return path


def run(*words: object) -> object:
    return CliRunner().invoke(app(), [str(word) for word in words])


@pytest.mark.filterwarnings("ignore")
def test_a_family_is_made_and_a_rerun_takes_up_what_is_there(
    encoder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["family", encoder, "--sizes", "8,16,32", "--data", texts, "-o", out, "--json"]
    first = run(*words, "--steps", 3)
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)["sizes"]
    assert [row["size"] for row in rows] == [8, 16, 32]
    assert rows[-1]["spearman"] > 0.9 and rows[0]["parameters"] < rows[1]["parameters"]
    small = transformers.AutoModel.from_pretrained(out / "size-8")
    assert small.config.hidden_size == 8 and small.config.num_attention_heads == 1
    assert json.loads((out / "size-8/1_Pooling/config.json").read_text()) == {
        "word_embedding_dimension": 8,
        "pooling_mode_mean_tokens": True,
    }
    # The table is shared, norms are corrected.
    whole = transformers.AutoModel.from_pretrained(out / "size-32")
    tables = [m.get_parameter("embeddings.word_embeddings.weight") for m in (small, whole)]
    gains = [m.get_parameter("encoder.layer.0.output.LayerNorm.weight") for m in (small, whole)]
    assert torch.equal(tables[0], tables[1][:, :8])
    assert not torch.allclose(gains[0], gains[1][:8], rtol=0.01)
    made = (out / "start" / "matryoshka.json").stat().st_mtime_ns
    again = run(*words, "--steps", 3)
    assert again.exit_code == 0, again.output
    kept = [{k: v for k, v in row.items() if k != "rate"} for row in rows]
    found = json.loads(again.stdout)["sizes"]
    assert [{k: v for k, v in row.items() if k != "rate"} for row in found] == kept
    assert (out / "start" / "matryoshka.json").stat().st_mtime_ns == made


@pytest.mark.filterwarnings("ignore")
def test_without_steps_sizes_are_refitted(
    encoder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["family", encoder, "--sizes", "16,32", "--data", texts, "--json", "--steps", 0]
    rows = []
    for name in ("fitted", "ordered"):
        made = run(*words, "-o", tmp_path / name)
        assert made.exit_code == 0, made.output
        rows.append(json.loads(made.stdout)["sizes"])
        monkeypatch.setattr("matryoshkafy.refit", lambda *_: None)
    (fitted, whole), (ordered, _) = rows
    assert fitted["spearman"] > ordered["spearman"] + 0.05
    assert fitted["parameters"] == ordered["parameters"]
    assert whole["spearman"] > 0.99  # the largest stays the full model
    small = transformers.AutoModel.from_pretrained(tmp_path / "fitted" / "size-16")
    assert small.config.hidden_size == 16


@pytest.mark.filterwarnings("ignore")
def test_a_long_distillation_starts_from_a_turned_stream(
    encoder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short one cannot bring the full model back, and permutes it."""
    gained = tmp_path / "gained"
    shutil.copytree(encoder, gained)
    model = transformers.BertModel.from_pretrained(gained)
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    model.save_pretrained(gained)
    monkeypatch.setattr("matryoshkafy_cli.families.SETTLED", 5)
    out, rows, told = tmp_path / "out", {}, {}
    for steps in (4, 5):
        words = ["--sizes", "16,32", "--data", texts, "-o", out, "--steps", steps]
        found = run("family", gained, *words, "--json")
        assert found.exit_code == 0, found.output
        rows[steps] = json.loads(found.stdout)["sizes"]
        told[steps] = (out / "order.txt").read_text()
    assert told[4].startswith("rotated 0 groups") and told[5].startswith("rotated 1 groups")
    assert rows[4][-1]["spearman"] > rows[5][-1]["spearman"] > 0.5
    # The run of a permuted start is no beginning of one of a turned start.
    assert {path.name for path in out.glob("run*")} == {"run", "run-turned"}
    for row in rows[5]:
        small = transformers.AutoModel.from_pretrained(out / row["folder"])
        assert small.config.hidden_size == row["size"]


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_two_columns_is_measured(encoder: Path, texts: Path, tmp_path: Path) -> None:
    """A query that is its document finds it."""
    lines = texts.read_text().splitlines()
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"ask": line, "told": line}) for line in lines))
    words = ["--sizes", "8,32", "--data", data, "--task", "ask:told", "-o", out]
    found = run("family", encoder, *words, "--steps", 0, "--json")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["sizes"]
    assert [row["mrr@10"] for row in rows] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "missing.txt"}, "no such file"),
        ({"--data": __file__}, "expected .txt"),
        ({"model": "/nowhere"}, "config.json"),
    ],
)
def test_refusals_say_what_to_do(
    encoder: Path, texts: Path, tmp_path: Path, change: dict, message: str
) -> None:
    given = {"model": encoder, "--data": texts, "--sizes": "8,32", "-o": tmp_path / "out"} | change
    model = given.pop("model")
    found = run("family", model, *[word for pair in given.items() for word in pair])
    assert found.exit_code == 2 and message in found.output


def test_too_few_texts_are_refused(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("one\ntwo\n")
    found = run("family", encoder, "--sizes", "8,32", "--data", path, "-o", tmp_path / "out")
    assert found.exit_code == 2 and "at least 100" in found.output


def test_a_size_with_widths_of_its_own_is_written_with_them(encoder: Path, tmp_path: Path) -> None:
    """The ladder alone gives 32 hidden units at size 16; the doll was told 8."""
    from matryoshkafy_cli.family_texts import Texts
    from matryoshkafy_cli.text_encoders import load_encoder

    import matryoshkafy as mk

    own = load_encoder(encoder, 16)
    example = own.batch(["w1 w2", "w3"])
    plan = mk.inspect(own.embedder, (), example, sizes=[16, 32], nesting="sliced")
    hidden = {g.name: [8, 64] for g in plan.groups if "intermediate" in g.name}
    doll = mk.convert(
        own.embedder, (), example, sizes=[16, 32], nesting="sliced", overrides=hidden
    ).eval()
    Texts(own, ["w1"], ["w2"]).write(doll, mk.slice(doll, 16), tmp_path / "small")
    small = load_encoder(tmp_path / "small", 16)
    config = small.embedder.model.config
    assert (config.hidden_size, config.intermediate_size) == (16, 8)
    with torch.no_grad():
        error = (small.embedder(**example) - doll.outputs(**example)[16]).abs().max()
    assert error < 1e-5
