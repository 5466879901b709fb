"""norm_scales(): against arithmetic; a slice with them is a plain model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matryoshkafy as mk
from matryoshkafy.units.norm_scales import norm_scales
from matryoshkafy.units.permute import OrderError


class Stream(nn.Module):
    """A table and a norm over it, read by a head."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(30, 16), norm(16)
        self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.table.weight[:, 4:] *= 0.2
            self.norm.weight.add_(0.3 * torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.norm(self.table(x)))))


X = torch.arange(30).view(6, 5)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_factors_are_the_spread_of_the_first_units(norm: type[nn.Module]) -> None:
    model = Stream(norm)
    doll = mk.convert(model, X, sizes=[4, 8, 16], nesting="sliced")
    found = norm_scales(doll, [X[:3], X[3:]])
    table = model.table.weight.detach()
    bare = F.layer_norm(table, (16,)) if norm is nn.LayerNorm else F.rms_norm(table, (16,))
    for width, factor in zip([4, 8, 16], found.factors["norm.weight"], strict=True):
        first = bare[:, :width]
        centred = norm is nn.LayerNorm
        spread = first.var(1, correction=0).mean() if centred else first.square().mean()
        assert factor == pytest.approx(float(spread.sqrt()), rel=1e-4)
    assert found.factors["norm.weight"][0] > 1.3  # the first four units carry most


def test_a_slice_with_them_is_the_full_norm_cut_short() -> None:
    """RMSNorm of units of one length per half: the factor mends the prefix exactly."""
    model = Stream(nn.RMSNorm)
    with torch.no_grad():
        rows = F.normalize(torch.randn(30, 8)), 0.5 * F.normalize(torch.randn(30, 8))
        model.table.weight.copy_(torch.cat(rows, 1))
    doll = mk.convert(model, X, sizes=[8, 16], nesting="sliced")
    found = norm_scales(doll, [X])
    assert found.at(8)["norm.weight"] == pytest.approx((16 / 8 * 1 / 1.25) ** 0.5, rel=1e-4)
    state = dict(found.fold(mk.slice(doll, 8), 8).state_dict())
    normed = F.rms_norm(state["table.weight"], (8,), state["norm.weight"], eps=1e-9)
    wanted = model.norm(model.table.weight)[:, :8]
    torch.testing.assert_close(normed, wanted, rtol=1e-4, atol=1e-5)


def test_refusals_say_what_to_do() -> None:
    masked = mk.convert(Stream(nn.LayerNorm), X, sizes=[4, 16], nesting="masked")
    with pytest.raises(OrderError, match="sliced"):
        norm_scales(masked, [X])
    doll = mk.convert(Stream(nn.LayerNorm), X, sizes=[4, 16], nesting="sliced")
    with pytest.raises(OrderError, match="no batch"):
        norm_scales(doll, [])
    with pytest.raises(OrderError, match="expected one of 4, 16"):
        norm_scales(doll, [X]).at(5)
