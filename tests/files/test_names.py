"""Names of modules that a GraphModule keeps for itself, and names that look as if escaped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.dolls.slice import free_name, state_of

NAMES = ("meta", "graph", "code", "_graph", "_code", "shape_env", "print_readable", "plain", "user")


class Chain(nn.Module):
    """Linears under given names, one after the other."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        """x [N, 8] -> [N, 8]."""
        for name in self.names:
            x = torch.relu(self._modules[name](x))
        return x


def test_no_two_names_become_one():
    names = [f"{'user_' * count}{name}.weight" for count in range(4) for name in NAMES]
    assert len({free_name(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "names",
    [
        ["user_meta", "meta"],
        ["user_graph"],
        ["user_user_code", "user_code", "code"],
        ["shape_env", "user_shape_env"],
        ["_graph", "_code", "user__code"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_every_name_is_saved_sliced_and_loaded(tmp_path, names, nesting):
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    doll = mk.convert(Chain(names).eval(), (x,), sizes=[2, 4, 8], nesting=nesting)
    mk.save(doll, tmp_path / "doll")
    assert torch.equal(mk.load(tmp_path / "doll")(x), doll(x))
    for size in doll.sizes:
        small, loaded = mk.slice(doll, size), mk.load(tmp_path / "doll", size=size)
        assert list(state_of(small)) == list(state_of(loaded))
        assert set(state_of(small)) == set(doll.state_dict())
        assert torch.equal(small(x), loaded(x))
        torch.testing.assert_close(small(x), doll.outputs(x)[size])
        mk.save(small, tmp_path / str(size))
        assert torch.equal(mk.load(tmp_path / str(size))(x), small(x))
