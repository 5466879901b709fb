"""Losses and scores against torch's own cross entropy, size by size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from examples.fmrlrec import nesting
from examples.fmrlrec.config import Config, ConfigError, preset, replace
from examples.fmrlrec.nesting import build, nest
from examples.fmrlrec.nesting import objective as learning

INPUTS = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
TARGETS = torch.tensor([[0, 0, 4, 5], [6, 7, 8, 9]])


def by_torch(logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=0)


def plain(material, config: Config):
    model = build(config, material.data.item_count, material.features, 8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_a_ladder_of_one_rung_learns_as_the_plain_model(material, tiny) -> None:
    config = replace(tiny, {"sizes": "8", "learn_scales": False})
    model = plain(material, config)
    expected = by_torch(model(INPUTS))
    loss, per_size = learning(nest(model, config).eval(), config)(INPUTS, labels=TARGETS)
    torch.testing.assert_close(loss, expected)
    assert list(per_size) == [8]


@pytest.mark.parametrize("start", [0.0, 4.0])
def test_scales_start_at_the_width_that_is_told(start: float, material, tiny) -> None:
    config = replace(tiny, {"learn_scales": True, "score_scale": start})
    nested = learning(nest(plain(material, config), config).eval(), config)
    expected = {size: start / size if start else 1.0 for size in (2, 4, 8)}
    assert {size: scale.item() for size, scale in nested.loss.scales().items()} == (
        pytest.approx(expected)
    )
    _, per_size = nested(INPUTS, labels=TARGETS)
    for size, logits in nested.doll.outputs(INPUTS).items():
        torch.testing.assert_close(per_size[size], by_torch(logits * expected[size]).detach())


@pytest.mark.parametrize("weights", ["", "1/4:1,1/2:2,1:0.5"])
def test_nested_loss_is_the_weighted_sum_over_sizes(weights: str, material, tiny) -> None:
    config = replace(tiny, {"weights": weights})
    doll = nest(plain(material, config), config).eval()
    loss, per_size = learning(doll, config)(INPUTS, labels=TARGETS)
    expected = {size: by_torch(logits) for size, logits in doll.outputs(INPUTS).items()}
    given = [1.0, 2.0, 0.5] if weights else [1.0, 1.0, 1.0]
    total = sum(w * value for w, value in zip(given, expected.values(), strict=True))
    torch.testing.assert_close(loss, total)
    for size, value in expected.items():
        torch.testing.assert_close(per_size[size], value.detach())


@pytest.mark.parametrize("nesting_of", ["masked", "sliced"])
def test_a_sampled_loss_is_that_of_the_drawn_items(nesting_of: str, material, tiny) -> None:
    config = replace(tiny, {"nesting": nesting_of, "negatives": 9, "score_scale": 4.0})
    nested = learning(nest(plain(material, config), config).eval(), config)
    nested.loss.at_step(5)
    _, per_size = nested(INPUTS, labels=TARGETS)
    draws = torch.Generator().manual_seed(config.seed * 1_000_003 + 5)
    drawn = torch.randint(1, 41, (9,), generator=draws).tolist()
    for size, logits in nested.doll.outputs(INPUTS).items():
        rows = [
            (logits[i, t] * 4 / size, int(TARGETS[i, t])) for i, t in TARGETS.nonzero().tolist()
        ]
        found = [
            scores[[target, *(n for n in drawn if n != target)]].log_softmax(0)[0]
            for scores, target in rows
        ]
        torch.testing.assert_close(per_size[size], -torch.stack(found).mean().detach())
    nested.loss.at_step(6)
    assert nested(INPUTS, labels=TARGETS)[1] != per_size, "other items at another step"


@pytest.mark.parametrize("modality", ["both", "id"])
def test_nested_scores_are_those_of_every_output(modality: str, material, tiny) -> None:
    config = replace(tiny, {"modality": modality})
    doll = nest(plain(material, config), config).eval()
    outputs = doll.outputs(INPUTS)
    assert outputs.readout is not None, "the tail must be one product for the fused loss"
    found = dict(nesting.nested_scorer(doll)(INPUTS))
    assert list(found) == ["2", "4", "8"]
    for size, scores in found.items():
        torch.testing.assert_close(scores, outputs[int(size)][:, -1])


@pytest.mark.parametrize(
    ("sizes", "weights", "every"),
    [
        ((8, 16, 32, 64, 128, 256), [10, 4, 4, 4, 2, 2], [1, 1, 1, 1, 1, 2]),
        ((8, 16, 32, 64), [4, 4, 2, 2], [1, 1, 1, 2]),
        ((3, 7, 200), [10, 4, 2], [1, 1, 2]),
        ((64,), [2], [1]),
    ],
)
def test_a_preset_by_shares_of_the_width_fits_every_ladder(
    sizes: tuple[int, ...], weights: list[float], every: list[float]
) -> None:
    config = preset("ml-1m")
    assert nesting.per_size(config, "weights", sizes) == weights
    assert nesting.intervals(config, sizes) == every


@pytest.mark.parametrize("text", ["a:1", "1/0:2", "1/2:", "4,two", "1:2:3", "4,2"])
def test_weights_that_are_no_numbers_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--set weights=1/8:4,1:1"):
        nesting.per_size(replace(Config(), {"weights": text}), "weights", (4, 8))


def test_a_size_learns_at_one_step_of_as_many_as_told(material, tiny) -> None:
    config = replace(
        tiny, {"every": "1/4:1,1/2:2,1:3", "weights": "1/4:4,1/2:2,1:1", "learn_scales": False}
    )
    doll = nest(plain(material, config), config).eval()
    nested = learning(doll, config)
    real, outputs = TARGETS != 0, doll.outputs(INPUTS)
    losses = {s: functional.cross_entropy(outputs[s][real], TARGETS[real]) for s in doll.sizes}
    for step, sizes in enumerate([(2, 4, 8), (2,), (2, 4), (2, 8), (2, 4), (2,), (2, 4, 8)]):
        nested.loss.step = step
        found, per_size = nested(INPUTS, labels=TARGETS)
        assert list(per_size) == list(sizes)
        expected = sum({2: 4, 4: 2, 8: 1}[size] * losses[size] for size in sizes)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("every", ["1/2:0,1:1", "1/2:1,1:1.5", "1:-1"])
def test_steps_between_must_be_whole(every: str) -> None:
    with pytest.raises(ConfigError, match="--set every=1/2:1,1:2"):
        nesting.intervals(replace(Config(), {"every": every}), (2, 4, 8))
