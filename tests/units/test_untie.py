"""untie(): the head gets its own weight, the model computes what it did, and its stream turns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.units.permute import OrderError
from tests.units.test_rotate import PreNorm, tokens


class Scales(PreNorm):
    """Its forward reads the config, as T5's does."""

    def __init__(self) -> None:
        super().__init__(tied=True)
        self.config = SimpleNamespace(tie_word_embeddings=True)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits / 4 if self.config.tie_word_embeddings else logits


def test_a_stream_whose_head_was_tied_turns_after() -> None:
    model, x = PreNorm(tied=True), tokens()
    before = model(x).detach()
    doll = mk.convert(PreNorm(tied=True), x, sizes=[4, 8, 16], nesting="sliced")
    report = mk.rotate(doll, [x])
    assert [row.units for row in report.rotated] == [] and "mk.untie" in str(report)
    assert mk.untie(model, x) == ("head.weight",)
    assert model.head.weight is not model.table.weight
    doll = mk.convert(model, x, sizes=[4, 8, 16], nesting="sliced")
    report = mk.rotate(doll, [x])
    assert [row.units for row in report.rotated] == [16]
    assert torch.allclose(doll(x), before, atol=1e-4)


def test_what_is_not_tied_stays() -> None:
    model = PreNorm()
    head = model.head.weight
    assert mk.untie(model, tokens()) == () and model.head.weight is head


def test_a_class_that_reads_its_config_is_refused_and_left_as_it_was() -> None:
    model, x = Scales(), tokens()
    before = model(x).detach()
    with pytest.raises(
        OrderError, match=r"Scales computes something else.*head.weight is not tied"
    ):
        mk.untie(model, x)
    assert model.head.weight is model.table.weight and model.config.tie_word_embeddings
    assert torch.equal(model(x), before)


def test_gpt2_turns_and_its_sizes_are_gpt2(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
    ids = torch.randint(0, 50, (4, 12))
    before = model(ids).logits.detach()
    assert mk.untie(model) == ("lm_head.weight",) and not model.config.tie_word_embeddings
    doll = mk.convert(model, {"input_ids": ids}, sizes=[16, 32], nesting="sliced").eval()
    report = mk.rotate(doll, [{"input_ids": ids}], unread="leave")
    assert 32 in [row.units for row in report.rotated], str(report)
    assert torch.allclose(doll(input_ids=ids).logits, before, atol=1e-4)
    small = mk.slice(doll, 16)
    mk.save(small, tmp_path / "small", to="hf", like=model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert isinstance(loaded, transformers.GPT2LMHeadModel)
    assert loaded.lm_head.weight.data_ptr() != loaded.transformer.wte.weight.data_ptr()
    with torch.no_grad():
        error = (loaded(ids).logits - small(input_ids=ids).logits).abs().max()
    assert error < 1e-5
    model.save_pretrained(tmp_path / "full")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, doll(input_ids=ids).logits, atol=1e-5)
