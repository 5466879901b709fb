"""Which fields follow a width: found although values coincide, and compared on what can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.natives import huggingface
from matryoshkafy.natives.loading import load_native
from matryoshkafy.natives.native import find
from matryoshkafy.natives.recipe import NativeError

X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    """Width and groups build only together; the kernel and a spare width hold the same numbers."""

    def __init__(self, width: int = 32, groups: int = 4, kernel: int = 4, other: int = 16) -> None:
        super().__init__()
        if width // groups != 8:
            raise ValueError("eight units in each group")
        self.width, self.groups, self.kernel, self.other = width, groups, kernel, other
        self.first = nn.Linear(8, width)
        self.mix = nn.Conv1d(width, width, kernel, groups=width)
        self.gate = nn.Linear(width, groups)
        self.last = nn.Linear(width, 5)
        if other != width:
            self.project = nn.Linear(other, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, L, 8] -> [N, 5]"""
        h = torch.relu(self.mix(self.first(x).mT)).mean(-1)
        gates = self.gate(h).sigmoid()
        return self.last((h.unflatten(-1, (self.groups, 8)) * gates[..., None]).flatten(1))


@pytest.mark.filterwarnings("ignore::matryoshkafy.natives.native.NativeWarning")
def test_fields_that_build_only_together_are_found_among_others_of_the_same_value() -> None:
    torch.manual_seed(0)
    model = Mixer().eval()
    doll = mk.convert(model, (X,), sizes=[16, 32], nesting="sliced")
    small = mk.slice(doll, 16)
    found = find(small, model)
    assert {field[-1]: value for field, value in found.changes.items()} == {
        "width": 16,
        "groups": 2,
    }
    # other == width: the class has no projection, which no forward reads in any case.
    assert not hasattr(found.module, "project")
    torch.testing.assert_close(found.module(X), small(X))


class Boxes(nn.Module):
    """Takes boxes whose second corner lies behind their first, as models of pages do."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.table, self.head = nn.Embedding(8, width), nn.Linear(width, 3)

    def forward(self, corners: torch.Tensor) -> torch.Tensor:
        """corners [N, 2] -> [N, 3]"""
        return self.head(self.table(corners[:, 1] - corners[:, 0]))


def test_inputs_are_given_where_random_ones_do_not_run() -> None:
    torch.manual_seed(0)
    corners = torch.tensor([[0, 7], [2, 6], [1, 1], [4, 5]])
    model = Boxes().eval()
    small = mk.slice(mk.convert(model, (corners,), sizes=[8, 16], nesting="sliced"), 8)
    with pytest.raises(NativeError, match=r"do not run.*inputs=\(ARGS, KWARGS\)"):
        mk.native(small, like=model)
    native = mk.native(small, like=model, inputs=((corners,), {}))
    torch.testing.assert_close(native(corners), small(corners))


class Counted(nn.Module):
    """A class that checks what its trace does not: there is a 1 in every row."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.table, self.head = nn.Embedding(30, width), nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [N, L] -> [N, 3]"""
        if not torch.compiler.is_compiling() and not bool((ids == 1).any(1).all()):
            raise ValueError("a row without its mark")
        return self.head(self.table(ids).mean(1))


def test_a_class_that_refuses_random_inputs_asks_for_the_users() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 29, 0], [7, 8, 1]])
    model = Counted().eval()
    small = mk.slice(mk.convert(model, (ids,), sizes=[8, 16], nesting="sliced", check=False), 8)
    with pytest.raises(NativeError, match=r"do not run through it.*inputs=\(ARGS, KWARGS\)"):
        mk.native(small, like=model)
    torch.testing.assert_close(mk.native(small, like=model, inputs=((ids,), {}))(ids), small(ids))


def llama(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_with_a_cache_is_compared_without_and_generates_with_it() -> None:
    ids = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    model = llama(use_cache=True)
    small = mk.slice(mk.convert(model, (ids,), sizes=[16, 32], nesting="sliced"), 16)
    native: Any = mk.native(small, like=model)
    assert native.config.use_cache is True
    assert native(ids).past_key_values.get_seq_length() == 5
    made = native.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    again = native.generate(
        ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(made, again)


@pytest.mark.filterwarnings("ignore")
def test_what_a_class_fills_itself_as_it_loads_is_kept_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the padding's row of some classes, which transformers zeroes in each model it loads."""
    load = huggingface.load

    def filled(*args: Any) -> Any:
        loaded = load(*args)
        loaded.model.embed_tokens.weight.data[0] = 0
        return loaded

    monkeypatch.setattr(huggingface, "load", filled)
    model = llama(use_cache=False)
    ids = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    small = mk.slice(mk.convert(model, (ids,), sizes=[16, 32], nesting="sliced"), 16)
    with pytest.raises(NativeError, match="embed_tokens.weight.*fills them anew.*tables=True"):
        mk.save(small, tmp_path / "refused", to="hf", like=model)
    assert not (tmp_path / "refused").exists()
    folder = mk.save(small, tmp_path / "kept", to="hf", like=model, tables=True)
    kept = load_native(folder).model.embed_tokens.weight
    assert torch.equal(kept, model.model.embed_tokens.weight[:, :16])
