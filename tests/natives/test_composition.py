"""Native sizes among the tools of others: adapters, quantisation, compilation, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import matryoshkafy as mk
from tests.natives.test_saving import checkpoint, greedy, llama

__all__ = ["checkpoint", "llama"]
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 97, (1, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def halves(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of two sizes."""
    place = tmp_path_factory.mktemp("sizes")
    return {
        size: mk.save(mk.load(checkpoint, size=size), place / str(size), to="hf", like=checkpoint)
        for size in (16, 32)
    }


def loaded(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def test_a_small_size_drafts_for_a_large_one(halves: dict[int, Path], checkpoint: Path) -> None:
    """Speculative decoding may change the speed, never the text."""
    large, small = loaded(halves[32]), loaded(halves[16])
    plain = large.generate(IDS, max_new_tokens=10, do_sample=False)
    drafted = large.generate(IDS, max_new_tokens=10, do_sample=False, assistant_model=small)
    assert torch.equal(drafted, plain)
    assert torch.equal(plain, greedy(mk.load(checkpoint, size=32), IDS, plain.shape[1]))


def test_lora_trains_a_native_size_and_nothing_else(halves: dict[int, Path]) -> None:
    peft = pytest.importorskip("peft", reason="LoRA is peft's")
    model = loaded(halves[32])
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("lora" in name for name in trained)
    before = {n: p.clone() for n, p in adapted.named_parameters()}
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0).step()
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= set(trained)


def test_torchao_quantises_a_native_size(halves: dict[int, Path]) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights are torchao's")
    model = loaded(halves[32])
    with torch.no_grad():
        exact = model(input_ids=IDS).logits
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        rough = model(input_ids=IDS).logits
    kinds = {type(p.data).__name__ for n, p in model.named_parameters() if "q_proj" in n}
    assert kinds != {"Tensor"}
    error = float((rough - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.05


def test_dynamic_int8_finds_the_linears(halves: dict[int, Path]) -> None:
    model = loaded(halves[32])
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    kinds = [type(m).__module__ for m in quantised.modules()]
    assert sum(kind.startswith("torch.ao.nn.quantized.dynamic") for kind in kinds) == 15
    assert not any(isinstance(m, torch.nn.Linear) for m in quantised.modules())


def test_pipeline_takes_a_native_size(halves: dict[int, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(97)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2")
    speak = transformers.pipeline("text-generation", loaded(halves[32]), tokenizer=tokenizer)
    (said,) = speak("w5 w9 w11", max_new_tokens=3, do_sample=False)
    assert said["generated_text"].startswith("w5 w9 w11")
    assert said["generated_text"].count("w") > 3


@pytest.mark.slow
def test_compiled_it_computes_the_same(halves: dict[int, Path]) -> None:
    model = loaded(halves[32])
    with torch.no_grad():
        exact = model(input_ids=IDS, use_cache=False).logits
        found = torch.compile(model, backend="aot_eager")(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_a_device_map_places_a_native_size(halves: dict[int, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="device maps are accelerate's")
    placed = transformers.LlamaForCausalLM.from_pretrained(halves[32], device_map={"": "cpu"})
    with torch.no_grad():
        given, wanted = placed(input_ids=IDS).logits, loaded(halves[32])(input_ids=IDS).logits
    assert torch.equal(given, wanted)
