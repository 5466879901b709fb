"""The wide zoo under the judge: what is neither right nor refused by name fails.

Needs the extra `wide`; a model whose library is not installed is skipped.
"""

from __future__ import annotations

import pytest

from tests.zoo.wide.registry import wide_entries
from tests.zoo.wide.table import NESTINGS, measure

ENTRIES = {entry.name: entry for entry in wide_entries()}


def test_the_wide_zoo_is_wide() -> None:
    assert len(ENTRIES) >= 80
    assert len({entry.family for entry in ENTRIES.values()}) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.filterwarnings("ignore")
def test_right_or_refused_by_name(name: str) -> None:
    rows = measure(ENTRIES[name])
    if rows[0]["status"] == "unbuilt":
        pytest.skip(rows[0]["checks"]["build"])
    assert [row["nesting"] for row in rows] == list(NESTINGS)
    bad = {row["nesting"]: row["checks"] for row in rows if row["status"] in ("wrong", "crash")}
    assert not bad, bad
