"""The generated trees are what the code says, and every path that a page names is there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_pages_show_the_tree_as_it_is() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "tree.py", "--check"])
    assert done.returncode == 0, "run: python docs/tree.py"


def test_a_page_that_lies_is_seen() -> None:
    tree = runpy.run_path(str(ROOT / "docs" / "tree.py"))
    page = "a\n<!-- tree: folders, generated -->\nSTALE\n<!-- /tree -->\nb\n"
    new = tree["filled"](page)
    assert "plan/" in new and "STALE" not in new
    assert tree["filled"](new) == new
    assert tree["filled"](page, ("modules",)) == page


@pytest.mark.parametrize("page", ["README.md", "docs/where.md", "docs/house.md"])
def test_every_path_that_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:matryoshkafy|tests|cli|docs|examples)/[\w./-]*)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing


def test_every_error_stands_on_the_page_of_errors() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "matryoshkafy").rglob("*.py"))
    defined = re.findall(r"^class (\w+)\((?:\w*Error)\):", text, re.MULTILINE)
    assert len(defined) > 15
    assert not [name for name in defined if f"`{name}`" not in page]
