"""The conversion finds by itself what nests, and keeps what does not."""

from __future__ import annotations

import pytest
import torch

import matryoshkafy as mk
from examples.fmrlrec.config import ConfigError, replace
from examples.fmrlrec.model import Recommender, Shape
from examples.fmrlrec.nesting import build, nest, sizes_of

SEQUENCES = torch.tensor([[0, 0, 3, 4, 9], [5, 6, 7, 8, 1]])


def test_model_states_and_layers_are_groups_and_items_stay(material, tiny) -> None:
    doll = nest(build(tiny, 40, material.features, 8), tiny)
    small = mk.slice(doll, 2).state_dict()
    assert small["items.features"].shape == (41, 12)
    assert small["items.project.weight"].shape == (2, 12)
    assert small["bias"].shape == (41,)
    for block in range(tiny.blocks):
        name = f"blocks.{block}."
        assert small[f"{name}mix.nu_log"].shape == (4,)
        assert small[f"{name}mix.in_proj.weight"].shape == (8, 2)
        assert small[f"{name}mix.out_proj.weight"].shape == (2, 8)
        assert small[f"{name}feed.gate.weight"].shape == (8, 2)


@pytest.mark.parametrize("modality", ["both", "id"])
@pytest.mark.parametrize("norm", ["block", "prefix"])
def test_every_size_is_its_slice(modality: str, norm: str, material, tiny) -> None:
    config = replace(tiny, {"modality": modality, "norm": norm})
    doll = nest(build(config, 40, material.features, 8), config).double().eval()
    for size, output in doll.outputs(SEQUENCES).items():
        torch.testing.assert_close(mk.slice(doll, size)(SEQUENCES), output)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_sliced_sub_model_is_the_small_recommender(size: int, material, tiny) -> None:
    """In sliced nesting the sub-model is what `Recommender` computes at the smaller width."""
    config = replace(tiny, {"nesting": "sliced"})
    doll = nest(build(config, 40, material.features, 8), config).eval()
    small = mk.slice(doll, size).eval()
    features = torch.from_numpy(material.features.joined("both"))
    native = Recommender(Shape(items=40, width=size), features).eval()
    native.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(SEQUENCES), native(SEQUENCES))


def test_units_beyond_a_prefix_do_not_move_it(material, tiny) -> None:
    doll = nest(build(tiny, 40, material.features, 8), tiny).eval()
    before = doll.outputs(SEQUENCES)[4].clone()
    with torch.no_grad():
        for name, parameter in doll.named_parameters():
            if name.endswith("nu_log"):
                parameter[8:] += 1.0
            elif name.endswith("in_proj.weight"):
                parameter[16:] += 1.0
    assert torch.equal(doll.outputs(SEQUENCES)[4], before)


def test_ratios_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="give units"):
        sizes_of(replace(tiny, {"sizes": "0.5,1.0"}))
