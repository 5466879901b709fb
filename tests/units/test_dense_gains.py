"""dense_gains(): the same function, and a post-norm stream that turns exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import matryoshkafy as mk
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.dense_gains import dense_gains
from matryoshkafy.units.permute import OrderError
from tests.units.test_rotate import PostNorm, tokens


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_post_norm_stream_turns_exactly(norm: type[nn.Module]) -> None:
    model = PostNorm(norm)
    before = model(tokens(3)).detach()
    assert dense_gains(model) == ("norms.0", "norms.1", "norms.2")
    torch.testing.assert_close(model(tokens(3)), before, rtol=1e-5, atol=1e-5)
    doll = mk.convert(model, tokens(), sizes=[4, 8, 16], nesting="sliced")
    report = mk.rotate(doll, [tokens(1), tokens(2)], unread="leave")
    assert sum(row.units == 16 for row in report.rotated) >= 2  # a basis for each stretch
    assert not any("post-norm" in why for _, why in report.obstacles)
    assert relative_error(doll(tokens(3)).detach(), before) <= 1e-4
    assert mk.verify(doll, tokens()).passed


def test_a_model_without_gains_is_refused() -> None:
    with pytest.raises(OrderError, match="no nn.LayerNorm"):
        dense_gains(nn.Linear(3, 3))
