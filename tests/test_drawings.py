"""The pictures of the idea pages are what the library draws, and every page shows its own."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
DRAWINGS = runpy.run_path(str(ROOT / "docs" / "drawings.py"))
PAGES = {
    "nestings": "nestings.md",
    "scopes": "nestings.md",
    "slice": "slicing.md",
    "attention": "axes.md",
    "checkpoint": "checkpoints.md",
    "losses": "losses.md",
    "ladder": "sizes.md",
    "plan": "plan.md",
    "rules": "rules.md",
    "held": "weights.md",
    "trace": "trace.md",
}


def test_every_idea_page_has_a_picture() -> None:
    pages = {page.name for page in (ROOT / "docs" / "ideas").glob("*.md")}
    assert pages == set(PAGES.values())


@pytest.mark.parametrize("name", sorted(DRAWINGS["DRAWINGS"]))
def test_a_picture_is_what_the_library_draws(name: str) -> None:
    saved = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    drawn = DRAWINGS["drawn"](name)
    ElementTree.fromstring(drawn)
    if name != "checkpoint":  # its bars are sizes of files, which hold paths of this checkout
        assert drawn == saved, "run: python docs/drawings.py"
    page = ROOT / "docs" / "ideas" / PAGES[name]
    assert f"../images/{name}.svg" in page.read_text(encoding="utf-8")
