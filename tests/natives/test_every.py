"""One folder of every size: stock classes cut while they load, and read only what a size needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import matryoshkafy as mk
from matryoshkafy.natives.recipe import NativeError
from tests.natives.test_saving import checkpoint, llama, minilm

transformers = pytest.importorskip("transformers")
__all__ = ["checkpoint", "llama"]
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def every(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("every") / "sizes"
    return mk.save(mk.load(checkpoint), place, to="hf", like=checkpoint)


def cut(folder: Path, size: int | None, kind: Any = None, **more: Any) -> Any:
    kind = kind or transformers.AutoModelForCausalLM
    config = mk.MatryoshkaConfig(size=size)
    return kind.from_pretrained(folder, quantization_config=config, **more)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_stock_class_loads_each_size(every: Path, checkpoint: Path, size: int) -> None:
    model, small = cut(every, size), mk.load(checkpoint, size=size)
    assert type(model) is transformers.LlamaForCausalLM
    with torch.no_grad():
        given, wanted = model(IDS).logits, small(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    assert model.config.use_cache is True
    assert model.generation_config.max_new_tokens == 5


def test_only_the_files_of_the_size_are_read(every: Path, tmp_path: Path) -> None:
    device = tmp_path / "device"
    shutil.copytree(every, device)
    for later in ("level-1.safetensors", "level-2.safetensors"):
        (device / later).unlink()
    state = cut(device, 16).state_dict()
    held = (device / "level-0.safetensors").stat().st_size
    values = sum(t.numel() * t.element_size() for t in state.values())
    assert values <= held <= 1.15 * values
    with pytest.raises(mk.MatryoshkafyError, match="level-1.safetensors"):
        cut(device, 32)


def test_what_is_loaded_is_stock_and_is_saved_as_such(every: Path, tmp_path: Path) -> None:
    model = cut(every, 32)
    model.save_pretrained(tmp_path / "half")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert not {"quantization_config", "matryoshka", "transformers_weights"} & set(config)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_base_model_and_another_type_load_too(every: Path, checkpoint: Path) -> None:
    base = cut(every, 16, transformers.AutoModel, dtype=torch.bfloat16)
    assert (type(base).__name__, base.dtype) == ("LlamaModel", torch.bfloat16)
    whole = mk.load(checkpoint, size=16).state_dict()["model.norm.weight"]
    assert torch.equal(base.state_dict()["norm.weight"], whole.bfloat16())


def test_without_a_size_it_is_the_largest(every: Path, llama: Path) -> None:
    full = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert all(torch.equal(t, full[n]) for n, t in cut(every, None).state_dict().items())


def test_the_folder_is_a_checkpoint_of_ours_too(every: Path, checkpoint: Path) -> None:
    mine, given = mk.load(every, size=32), mk.load(checkpoint, size=32)
    assert all(torch.equal(t, given.state_dict()[n]) for n, t in mine.state_dict().items())


def test_wrong_sizes_and_folders_are_refused_by_name(every: Path, llama: Path) -> None:
    with pytest.raises(NativeError, match="size=20.*16, 32, 64"):
        cut(every, 20)
    with pytest.raises(NativeError, match='holds no sizes.*to="hf"'):
        cut(llama, 16)
    # A loader that knows nothing of sizes finds no weights, rather than wrong ones.
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(every)


def test_other_libraries_have_no_such_loader(tmp_path: Path) -> None:
    from tests.natives.test_native import IDS as CALL
    from tests.natives.test_native import Net

    net = Net().eval()
    doll = mk.convert(net, CALL, sizes=[16, 32], nesting="sliced")
    with pytest.raises(NativeError, match=r"expected a model of transformers.*slice"):
        mk.save(doll, tmp_path / "out", to="class", like=net)
    assert not list(tmp_path.iterdir())


def test_a_part_that_the_trace_does_not_read_is_loaded_at_each_size(tmp_path: Path) -> None:
    """GPT-2 ties its head; BERT's pooler is not read where only the states are returned."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    doll = mk.convert(model, (), {"input_ids": IDS}, sizes=[16, 32], nesting="sliced")
    folder = mk.save(doll, tmp_path / "bert", to="hf", like=model)
    small = cut(folder, 16, transformers.BertForMaskedLM)
    assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        wanted = mk.slice(doll, 16)(input_ids=IDS).logits
        torch.testing.assert_close(small(IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_sentence_transformers_cuts_while_it_loads(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    original = minilm()
    model = transformers.AutoModel.from_pretrained(original).eval()
    call = {"input_ids": IDS + 100, "attention_mask": torch.ones_like(IDS)}
    doll = mk.convert(model, (), call, sizes=[96, 192, 384], nesting="sliced")
    folder = mk.save(doll, tmp_path / "all", to="st", like=original)
    alone = mk.save(mk.slice(doll, 96), tmp_path / "96", to="st", like=original)
    texts = ["a cat on a mat", "the stock market"]
    config = {"quantization_config": mk.MatryoshkaConfig(size=96)}
    cutting = st.SentenceTransformer(str(folder), device="cpu", model_kwargs=config)
    wanted = st.SentenceTransformer(str(alone), device="cpu").encode(texts)
    found = cutting.encode(texts)
    assert found.shape == (2, 96)
    assert abs(found - wanted).max() < 1e-6
