"""The benchmark's dolls of several lengths against the unconverted model on padded histories."""

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional

from examples.fmrlrec.config import Config
from examples.fmrlrec.data import Dataset
from tests.benchmarks.recommender_models import RECIPES, small
from tests.benchmarks.recommenders import Nested, Training, backward_of, dolls_of, loss_of

ITEMS, LENGTH = 30, 32


def training(model: str) -> Training:
    """One size alone, without dropout, so that it is the plain model's loss."""
    data = Dataset(
        np.arange(1, ITEMS + 1, dtype=np.int32),
        np.array([0, ITEMS]),
        pl.Series(["a"]),
        pl.DataFrame({"item_id": range(ITEMS)}),
        {},
    )
    config = Config(max_length=LENGTH)
    return Training(data, RECIPES[model], Nested("16"), config, seed=0, epochs=1)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("longest", (3, 11))
@pytest.mark.parametrize("model", ("lrurec", "fmrlrec", "bert4rec"))
def test_a_short_batch_has_the_loss_of_its_padded_histories(model: str, longest: int) -> None:
    random = np.random.default_rng(longest)
    rows = torch.from_numpy(random.integers(1, ITEMS + 1, (4, longest + 1)))
    rows[1, : longest // 2] = 0
    inputs, targets = rows[:, :-1], torch.where(rows[:, :-1] > 0, rows[:, 1:], 0)
    own = training(model)
    dolls = dolls_of(own)
    loss = loss_of(dolls.longest, own.nested)

    found = backward_of(own, dolls.train(False), loss)(inputs, targets)

    torch.manual_seed(own.seed)
    plain = small(
        own.recipe.build(ITEMS + own.recipe.tokens, 16, LENGTH), own.recipe.dropout, own.seed
    ).eval()
    pads = (LENGTH - longest, 0)
    scores = plain(functional.pad(inputs, pads)) * (64 / 16)
    wanted = functional.cross_entropy(
        scores.flatten(0, 1), functional.pad(targets, pads).flatten(), ignore_index=0
    )
    wanted.backward()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    gradients = dict(dolls.longest.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name
            )
