"""Folders that the version before plan format 2, guards and held files wrote still load.

`format1/` holds a small residual MLP over an item table (7 items, width 8, sizes 2, 4, 8) in both
nestings, its slice of size 4, and what the dolls of that version answered to `IDS`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import matryoshkafy as mk

HERE = Path(__file__).parent / "format1"
IDS = torch.arange(6).view(2, 3)
NESTINGS = ("masked", "sliced")


@pytest.mark.parametrize("name", [*NESTINGS, "submodel"])
def test_the_folders_are_of_the_first_format(name):
    manifest = json.loads((HERE / name / "matryoshka.json").read_text())
    assert manifest["format"] == manifest["plan"]["format"] == 1
    assert "guards" not in manifest["signature"]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_size_answers_as_it_did(nesting):
    expected = load_file(HERE / f"{nesting}_outputs.safetensors")
    doll = mk.load(HERE / nesting)
    with torch.no_grad():
        outputs = doll.outputs(IDS)
        for size in (2, 4, 8):
            for found in (outputs[size], mk.load(HERE / nesting, size=size)(IDS)):
                torch.testing.assert_close(found, expected[str(size)])


def test_a_slice_is_the_same_model(tmp_path):
    expected = load_file(HERE / "sliced_outputs.safetensors")
    small = mk.load(HERE / "submodel")
    with torch.no_grad():
        torch.testing.assert_close(small(IDS), expected["4"])
        torch.testing.assert_close(mk.load(HERE / "submodel", size=2)(IDS), expected["2"])


@pytest.mark.parametrize("nesting", NESTINGS)
def test_saved_again_it_is_of_this_format(nesting, tmp_path):
    doll = mk.load(HERE / nesting)
    mk.save(doll, tmp_path / "c")
    again = mk.load(tmp_path / "c")
    assert again.plan == doll.plan and again.plan.stored
    with torch.no_grad():
        assert torch.equal(again(IDS), doll(IDS))
