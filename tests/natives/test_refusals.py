"""What cannot become a stock model, by the command line: exit code 2, a reason, nothing written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import matryoshkafy as mk
from matryoshkafy.natives.saving import source_at
from tests.natives.test_command import run
from tests.natives.test_saving import checkpoint, llama

__all__ = ["checkpoint", "llama"]
pytestmark = pytest.mark.filterwarnings("ignore")


def refused(folder: Path, *words: object) -> str:
    """Return the reason of a command that must write nothing into an empty folder."""
    code, text = run(*words, "-o", folder / "out")
    assert code == 2, text
    assert not list(folder.iterdir())
    return text


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Return what copies a checkpoint with another text in its side files, the digest not told."""

    def alter(old: str, new: str) -> Path:
        copied = tmp_path / "copy"
        shutil.copytree(checkpoint, copied)
        side = copied / "source.json"
        side.write_text(side.read_text().replace(old, new))
        return copied

    return alter


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_a_size_without_a_configuration(llama: Path, tmp_path: Path, target: Path) -> None:
    kept = tmp_path / "doll"
    code, text = run("convert", llama, "--sizes", "20,64", "--nesting", "sliced", "-o", kept)
    assert code == 0, text
    text = refused(target, "slice", kept, "--size", 20, "--to", "hf")
    assert "LlamaForCausalLM" in text
    assert "multiple_of=64" in text


def test_a_class_that_needs_its_weights(checkpoint: Path, target: Path) -> None:
    builder = "tests.natives.built:from_weights"
    text = refused(target, "slice", checkpoint, "--size", 16, "--to", "class", "--class", builder)
    assert "cannot be built from its configuration alone" in text


def test_a_builder_without_numbers(checkpoint: Path, target: Path) -> None:
    builder = "tests.natives.built:of_one_size"
    text = refused(target, "slice", checkpoint, "--size", 16, "--to", "class", "--class", builder)
    assert "no number that could be a width" in text


def test_code_that_a_configuration_names(llama: Path, tmp_path: Path, target: Path) -> None:
    folder, ran = tmp_path / "remote", tmp_path / "ran"
    shutil.copytree(llama, folder)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass OwnConfig: pass\n")
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps(config))
    text = refused(target, "convert", folder, "--sizes", "16,64")
    assert "not run" in text
    assert "--trust-remote-code" in text
    assert not ran.exists()


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=32, vocab_size=40, **rest):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**rest)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids):
        return self.head(self.table(input_ids))
"""


def test_code_that_is_trusted_is_run(tmp_path: Path, target: Path) -> None:
    folder, places = tmp_path / "own_folder", torch.randint(0, 40, (2, 7))
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    named = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32, "vocab_size": 40}))
    layers = nn.ModuleDict({"table": nn.Embedding(40, 32), "head": nn.Linear(32, 40)})
    save_file(layers.state_dict(), folder / "model.safetensors", {"format": "pt"})
    refused(target, "convert", folder, "--sizes", "16,32")
    checkpoint = tmp_path / "kept"
    code, text = run("convert", folder, "--sizes", "16,32", "--trust-remote-code", "-o", checkpoint)
    assert code == 0, text
    wanted = layers["head"](layers["table"](places))
    torch.testing.assert_close(mk.load(checkpoint)(places), wanted)
    text = refused(target, "slice", checkpoint, "--size", 16, "--to", "hf")
    assert "code of its own" in text
    text = refused(target, "convert", "model.py", "--sizes", "16", "--trust-remote-code")
    assert "folder of transformers" in text


def test_a_tokenizer_that_is_missing(checkpoint: Path, tmp_path: Path, target: Path) -> None:
    text = refused(target, "slice", checkpoint, "--size", 16, "--to", "st")
    assert "modules.json" in text
    files = {**source_at(checkpoint).files, "modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    source = dataclasses.replace(source_at(checkpoint), library="st", files=files)
    kept = mk.save(mk.load(checkpoint), tmp_path / "st", source=source)
    text = refused(target, "slice", kept, "--size", 16, "--to", "st")
    assert "holds no tokenizer" in text


def test_a_folder_that_exists(checkpoint: Path, target: Path) -> None:
    (target / "text").write_text("precious")
    for force in ((), ("--force",)):
        words = ("slice", checkpoint, "--size", 16, "--to", "hf", "-o", target, *force)
        code, text = run(*words)
        assert code == 2, text
        assert "folder" in text
        assert [p.name for p in target.iterdir()] == ["text"]


def test_side_files_that_were_altered(altered: Callable[[str, str], Path], target: Path) -> None:
    text = refused(target, "slice", altered("terms", "other"), "--size", 16, "--to", "hf")
    assert "source.json" in text
    assert "changed or damaged" in text
