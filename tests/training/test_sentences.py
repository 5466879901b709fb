"""NestedSentenceLoss: against the library's own MatryoshkaLoss and against slices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.training import NestedSentenceLoss, SentenceLossError
from tests.small_models import sentence_encoder

library = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["one two", "three four five", "six", "two five three"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sentence_encoder(tmp_path_factory.mktemp("bert"))


def features(model: Any) -> list[dict[str, Tensor]]:
    return [dict(model.preprocess(part)) for part in (TEXTS[:2], TEXTS[2:])]


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


KINDS = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_output_it_is_the_librarys_own_loss(encoder: Any, kind: str) -> None:
    model = copy.deepcopy(encoder).eval()
    doll = mk.convert(model, sizes=[4, 16], scope="output")
    ours = NestedSentenceLoss(doll, getattr(losses, kind)(model), {4: 0.5})
    found = ours(features(model))
    grads = gradients(model, found)
    theirs = losses.MatryoshkaLoss(model, getattr(losses, kind)(model), [16, 4], [1.0, 0.5])
    wanted = theirs(features(model), None)
    torch.testing.assert_close(found, wanted)
    for name, grad in gradients(model, wanted).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["full", "ffn"])
def test_each_size_loses_what_its_slice_loses(encoder: Any, scope: str, kind: str) -> None:
    model = copy.deepcopy(encoder).eval()
    doll = mk.convert(model, sizes=[0.5, 1.0], scope=scope, nesting="sliced")
    ours = NestedSentenceLoss(doll, getattr(losses, kind)(model))
    found = ours(features(model))
    assert set(ours.per_size) == set(doll.sizes)
    small = mk.slice(doll, doll.sizes[0])
    pair = [small(one)["sentence_embedding"] for one in features(model)]
    a, b = (nn.functional.normalize(x, dim=-1) for x in pair)
    wanted = nn.functional.cross_entropy(20 * a @ b.t(), torch.arange(2))
    assert ours.per_size[doll.sizes[0]] == pytest.approx(float(wanted), rel=1e-4)
    assert float(found.detach()) == pytest.approx(sum(ours.per_size.values()), rel=1e-5)
    assert gradients(model, found)


def test_the_trainer_of_the_library_trains_every_size(encoder: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model = copy.deepcopy(encoder)
    doll = mk.convert(model, sizes=[4, 16], nesting="sliced")
    loss = NestedSentenceLoss(doll, losses.MultipleNegativesRankingLoss(model))
    rows = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    before = {size: float(t.sum()) for size, t in _embedded(doll, model).items()}
    library.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=rows, loss=loss
    ).train()
    after = {size: float(t.sum()) for size, t in _embedded(doll, model).items()}
    assert all(before[m] != after[m] for m in doll.sizes)
    assert mk.verify(doll, (features(model)[0],)).passed


def _embedded(doll: Any, model: Any) -> dict[int, Tensor]:
    with torch.no_grad():
        found = doll.outputs(features(model)[0])
        return {m: found[m]["sentence_embedding"] for m in doll.sizes}


def test_what_does_not_belong_together_is_refused(encoder: Any) -> None:
    model, other = copy.deepcopy(encoder), copy.deepcopy(encoder)
    doll = mk.convert(model, sizes=[4, 16], nesting="sliced")
    with pytest.raises(SentenceLossError, match="made for a model"):
        NestedSentenceLoss(doll, losses.MultipleNegativesRankingLoss(other))
    with pytest.raises(SentenceLossError, match="for the sizes"):
        NestedSentenceLoss(doll, losses.MultipleNegativesRankingLoss(model), {5: 1.0})
