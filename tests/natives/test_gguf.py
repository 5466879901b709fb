"""GGUF files of native sizes, as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import matryoshkafy as mk
from matryoshkafy.natives.gguf_files import write_gguf
from matryoshkafy.natives.recipe import NativeError
from tests.natives.test_saving import checkpoint, llama

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")
transformers = pytest.importorskip("transformers")
__all__ = ["checkpoint", "llama"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the GGUF file of the full model holds besides weights: 97 words."""
    path = tmp_path_factory.mktemp("words") / "full.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    words = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(3, 97))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * 97)
    writer.add_token_types([2, 3, 3, *[1] * 94])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def half(checkpoint: Path, llama: Path) -> Any:
    full = transformers.LlamaForCausalLM.from_pretrained(llama)
    return mk.native(mk.load(checkpoint, size=32), like=full)


def test_every_tensor_is_there_once(half: Any, vocabulary: Path, tmp_path: Path) -> None:
    path = write_gguf(half, tmp_path / "half.gguf", vocabulary=vocabulary)
    reader = gguf.GGUFReader(path)
    held = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert len(held) == len(list(half.parameters()))
    state = half.state_dict()
    torch.testing.assert_close(
        held["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"]
    )
    # Head 0 of 8 channels: 0, 4, 1, 5, ...
    q, mine = state["model.layers.0.self_attn.q_proj.weight"], held["blk.0.attn_q.weight"]
    assert torch.equal(mine[:4], q[[0, 4, 1, 5]])
    assert reader.fields["tokenizer.ggml.tokens"].contents()[3] == "▁w3"
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2


def test_what_cannot_be_written_is_refused(half: Any, vocabulary: Path, tmp_path: Path) -> None:
    path = write_gguf(half, tmp_path / "half.gguf")
    with pytest.raises(NativeError, match="exists"):
        write_gguf(half, path)
    with pytest.raises(NativeError, match="Linear was given.*convert_hf_to_gguf"):
        write_gguf(torch.nn.Linear(2, 2), tmp_path / "other.gguf")
    with pytest.raises(NativeError, match="vocabulary of 0, the model one of 97"):
        write_gguf(half, tmp_path / "other.gguf", vocabulary=path)
    assert [p.name for p in tmp_path.iterdir()] == ["half.gguf"]


def test_llama_cpp_says_the_same_tokens(half: Any, vocabulary: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(write_gguf(half, tmp_path / "half.gguf", vocabulary=vocabulary))
    params.n_ctx, params.n_gpu_layers, params.warmup = 64, 0, False
    server = xllamacpp.Server(params)
    prompt = [5, 9, 11, 40]
    asked = {"prompt": prompt, "n_predict": 12, "temperature": 0, "ignore_eos": True}
    (said,) = server.handle_completions(asked)["choices"]
    wanted = half.generate(
        torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    assert [int(word[1:]) for word in said["text"].split()] == wanted[0, 4:].tolist()
