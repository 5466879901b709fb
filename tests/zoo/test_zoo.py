"""The laws on the zoo: every required architecture in the quick suite, all the others in the
slow one.
"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("open_clip")
pytest.importorskip("torchvision")

from tests.zoo.laws import TOLERANCE, Row, measure
from tests.zoo.registry import entries
from tests.zoo.required import REQUIRED

OTHERS = [e.name for e in entries() if e.name not in REQUIRED and "large" not in e.tags]

# Graphs so small that their heads alone are more than a fifth of the nodes.
SMALL = {"deepfm": "27 nodes: three heads, their sum and the sigmoid are the tail"}


def _check_laws(row: Row) -> None:
    assert row.status == "ok", (row.status, row.message, row.identity, row.laws)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.filterwarnings("ignore")
def test_required(name: str) -> None:
    (entry,) = entries([name])
    for row in measure(entry):
        _check_laws(row)
        assert row.half <= 0.5, row
        assert row.tail <= 0.2 or name in SMALL, row
        assert row.native is None or row.native <= TOLERANCE, row


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_never_silently_wrong(name: str) -> None:
    (entry,) = entries([name])
    for row in measure(entry):
        assert row.status in ("ok", "refused"), row
        assert math.isfinite(row.laws)
