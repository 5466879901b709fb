"""Losses and scores of both objectives against torch's own cross entropy, size by size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from examples.fmrlrec import nesting
from examples.fmrlrec.config import Config, ConfigError, preset, replace
from examples.fmrlrec.nesting import build, nest

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


def test_plain_loss_is_cross_entropy_over_real_positions(material, tiny) -> None:
    model = plain(material, tiny)
    loss, _ = nesting.PlainObjective(model, tiny)(INPUTS, TARGETS)
    torch.testing.assert_close(loss, by_torch(model(INPUTS)))


@pytest.mark.parametrize("start", [0.0, 4.0])
def test_scales_start_at_the_width_that_is_told(start: float, material, tiny) -> None:
    config = replace(tiny, {"learn_scales": True, "score_scale": start})
    model = plain(material, config)
    alone = nesting.PlainObjective(model, config)
    loss, _ = alone(INPUTS, TARGETS)
    torch.testing.assert_close(loss, by_torch(model(INPUTS) * (start / 8 if start else 1.0)))
    assert [n for n, _ in alone.named_parameters() if not n.startswith("model.")] == ["log_scale"]
    nested = nesting.NestedObjective(nest(model, config), config)
    expected = {size: start / size if start else 1.0 for size in (2, 4, 8)}
    assert {size: scale.item() for size, scale in nested.loss.scales().items()} == (
        pytest.approx(expected)
    )


@pytest.mark.parametrize("weights", ["", "1,2,0.5"])
def test_nested_loss_is_the_weighted_sum_over_sizes(weights: str, material, tiny) -> None:
    config = replace(tiny, {"weights": weights})
    doll = nest(plain(material, config), config).eval()
    loss, per_size = nesting.NestedObjective(doll, config)(INPUTS, TARGETS)
    expected = {size: by_torch(logits) for size, logits in doll.outputs(INPUTS).items()}
    given = [float(w) for w in weights.split(",")] if weights else [1.0, 1.0, 1.0]
    total = sum(w * value for w, value in zip(given, expected.values(), strict=True))
    torch.testing.assert_close(loss, total)
    for size, value in expected.items():
        torch.testing.assert_close(per_size[f"loss {size}"], value.detach())


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


def test_plain_scores_are_the_last_position(material, tiny) -> None:
    model = plain(material, tiny)
    ((name, scores),) = nesting.PlainObjective(model, tiny).scorer()(INPUTS)
    assert name == "8"
    torch.testing.assert_close(scores, model(INPUTS)[:, -1])


def test_the_largest_size_teaches_from_the_epoch_that_is_told(material, tiny) -> None:
    config = replace(tiny, {"distill": 0.5, "distill_from": 2, "learn_scales": False})
    doll = nest(plain(material, config), config).eval()
    nested = nesting.NestedObjective(doll, config)
    nested.start_step(1, 1)
    before, _ = nested(INPUTS, TARGETS)
    nested.start_step(2, 2)
    after, _ = nested(INPUTS, TARGETS)
    real = TARGETS != 0
    scores = [doll.outputs(INPUTS)[size][real] for size in doll.sizes]
    soft = functional.softmax(scores[-1], -1)
    taught = sum(
        functional.kl_div(functional.log_softmax(one, -1), soft, reduction="batchmean")
        for one in scores[:-1]
    )
    torch.testing.assert_close(after, before + 0.5 * taught)


def test_the_last_weight_is_that_of_all_larger_sizes() -> None:
    config = replace(Config(), {"weights": "4,2"})
    assert nesting.per_size(config, "weights", (1, 2, 4, 8)) == [4, 2, 2, 2]
    with pytest.raises(ConfigError, match="are 2, the sizes only 1"):
        nesting.per_size(config, "weights", (8,))


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


@pytest.mark.parametrize("text", ["a:1", "1/0:2", "1/2:", "4,two", "1:2:3"])
def test_weights_that_are_no_numbers_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="write --set weights=4,2,1"):
        nesting.per_size(replace(Config(), {"weights": text}), "weights", (4, 8))


def test_a_size_learns_at_one_step_of_as_many_as_told(material, tiny) -> None:
    config = replace(tiny, {"every": "1,2,3", "weights": "4,2,1", "learn_scales": False})
    doll = nest(plain(material, config), config).eval()
    nested = nesting.NestedObjective(doll, config)
    real, outputs = TARGETS != 0, doll.outputs(INPUTS)
    losses = {s: functional.cross_entropy(outputs[s][real], TARGETS[real]) for s in doll.sizes}
    for step, sizes in enumerate([(2, 4, 8), (2,), (2, 4), (2, 8), (2, 4), (2,), (2, 4, 8)]):
        nested.start_step(0, step)
        found, per_size = nested(INPUTS, TARGETS)
        assert list(per_size) == [f"loss {size}" for size in sizes]
        expected = sum({2: 4, 4: 2, 8: 1}[size] * losses[size] for size in sizes)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("every", ["0,1,1", "1,1.5", "2", "1,-1"])
def test_steps_between_must_be_whole_and_one_size_learns_at_every_step(every: str) -> None:
    with pytest.raises(ConfigError, match="--set every=1,1,2"):
        nesting.intervals(replace(Config(), {"every": every}), (2, 4, 8))
