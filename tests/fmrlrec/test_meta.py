"""Nothing stays on the CPU: step, evaluation and slices on meta tensors, where a constant fails.

A CUDA device is not needed: meta tensors refuse to meet tensors of any other device.
"""

from __future__ import annotations

import pytest
import torch

import matryoshkafy as mk
from examples.fmrlrec.config import replace
from examples.fmrlrec.nesting import build, nest, nested_scorer, objective
from matryoshkafy.serving.ranks import rank

INPUTS = torch.ones(3, 6, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("nesting", "norm", "modality"),
    [("masked", "block", "id"), ("masked", "prefix", "both"), ("sliced", "block", "both")],
)
def test_a_training_step_stays_on_its_device(nesting, norm, modality, material, tiny) -> None:
    config = replace(tiny, {"nesting": nesting, "norm": norm, "modality": modality})
    doll = nest(build(config, 40, material.features, 8), config)
    learning = objective(doll, config).to("meta").train()
    learning.check = False  # a tensor without data is neither finite nor not
    optimizer = torch.optim.AdamW(learning.parameters())
    loss, per_size = learning(INPUTS, labels=INPUTS)
    loss.backward()
    optimizer.step()
    assert loss.device.type == "meta" and all(v.device.type == "meta" for v in per_size.values())
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in learning.parameters())


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_evaluation_and_slices_stay_on_their_device(nesting, material, tiny) -> None:
    config = replace(tiny, {"nesting": nesting})
    doll = nest(build(config, 40, material.features, 8), config).to("meta").eval()
    for _, scores in nested_scorer(doll)(INPUTS):
        assert rank(scores, INPUTS[:, 0]).above.device.type == "meta"
    for size in doll.sizes:
        small = mk.slice(doll, size)
        assert all(t.device.type == "meta" for t in small.state_dict().values())
        assert small(INPUTS).device.type == "meta"


@pytest.mark.parametrize("name", ["blocks.0.mix.nu_log", "bias"])
def test_what_is_left_behind_fails_here(name: str, material, tiny) -> None:
    """The check can fail: one parameter that stays on the CPU is found."""
    doll = nest(build(tiny, 40, material.features, 8), tiny)
    kept = torch.nn.Parameter(doll.get_parameter(name).detach().clone())
    doll = doll.to("meta").eval()
    path, _, last = name.rpartition(".")
    doll.get_submodule(path)._parameters[last] = kept
    with pytest.raises(RuntimeError, match="device"):
        doll(INPUTS)
