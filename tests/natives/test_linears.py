"""A slice's linears are modules: what looks for `nn.Linear` finds them, and changes the slice."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Two plain linears, one whose weight is read twice, one whose weight is a table's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 16)
        self.table = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.twice, self.tied = nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # The device and the type of what is made come from the first tensor that is read; dropout
        # reads the flag of training mode before it.
        places = nn.functional.dropout(torch.arange(ids.shape[1]) / 2, 0.1, self.training)
        h = self.first(places.unsqueeze(-1)) + self.table(ids)
        h = h + self.down(torch.relu(self.up(h)))
        h = self.twice(torch.relu(self.twice(h)))
        return self.tied(h)


IDS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return mk.slice(mk.convert(Net().eval(), (IDS,), sizes=[8, 16], nesting="sliced"), 8)


def test_a_linear_whose_weight_is_its_own_is_a_module(small: torch.fx.GraphModule) -> None:
    linears = {n: m for n, m in small.named_modules() if isinstance(m, nn.Linear)}
    assert set(linears) == {"first", "up", "down"}
    assert (linears["up"].in_features, linears["up"].out_features) == (8, 16)
    assert linears["down"].bias is None
    assert set(small.state_dict()) == set(Net().state_dict())


def test_a_linear_that_was_loaded_is_a_module(small: torch.fx.GraphModule, tmp_path: Path) -> None:
    """Files hold tensors by name: the bias before the weight."""
    loaded = mk.load(mk.save(small, tmp_path / "small"))
    assert {n for n, m in loaded.named_modules() if isinstance(m, nn.Linear)} == {
        "first",
        "up",
        "down",
    }


def test_what_replaces_it_changes_what_is_computed(small: torch.fx.GraphModule) -> None:
    before = small(IDS)
    quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    after = quantised(IDS)
    error = float((after - before).abs().max() / before.abs().max())
    assert 0 < error < 0.1
    assert torch.equal(small(IDS), before)
    again = copy.deepcopy(quantised)
    assert torch.equal(again(IDS), after)


def test_a_slice_that_holds_foreign_modules_is_refused(
    small: torch.fx.GraphModule, tmp_path: Path
) -> None:
    small.up = nn.Sequential(nn.Linear(8, 16))
    for verb in (lambda: mk.save(small, tmp_path / "out"), lambda: pickle.dumps(small)):
        with pytest.raises(PlanError, match=r"up of the sub-model is a Sequential.*Merge"):
            verb()


def test_lora_trains_a_slice(small: torch.fx.GraphModule) -> None:
    peft = pytest.importorskip("peft", reason="LoRA is peft's")
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules=["up", "down"]))
    trained = [p for _, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    before = adapted(IDS)
    for _ in range(2):  # the second matrix of an adapter is zero at first
        adapted(IDS).square().sum().backward()
        torch.optim.SGD(trained, lr=1e-3).step()
    moved = adapted(IDS)
    assert not torch.equal(moved, before)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS), moved, rtol=1e-4, atol=1e-4)


def test_saving_copying_and_exporting_see_the_same_model(
    small: torch.fx.GraphModule, tmp_path: Path
) -> None:
    mk.save(small, tmp_path / "small")
    assert torch.equal(mk.load(tmp_path / "small")(IDS), small(IDS))
    assert torch.equal(copy.deepcopy(small)(IDS), small(IDS))
    exported = mk.export(small, tmp_path / "small.pt2", to="pt2")
    program = torch.export.load(str(exported.path))
    torch.testing.assert_close(program.module()(IDS), small(IDS))


def test_a_slice_says_how_to_generate(small: torch.fx.GraphModule) -> None:
    assert not hasattr(small, "generate")
    with pytest.raises(AttributeError, match=r"mk\.native\(small, like=model\)\.generate.*Decoder"):
        small.generate(IDS)
    with pytest.raises(AttributeError, match="nothing_else"):
        _ = small.nothing_else
