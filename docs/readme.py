"""Copies what the README shows of the results out of their pages.

    python docs/readme.py            # writes README.md
    python docs/readme.py --check    # exits 1 where README.md is behind

A section of the README between `<!-- from PAGE: ... -->` and `<!-- /from -->` is what PAGE holds
between `<!-- readme -->` and `<!-- /readme -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"(<!-- from (?P<page>\S+):.*? -->\n).*?(<!-- /from -->)", re.DOTALL)
SHARE = re.compile(r"<!-- readme -->\n(?P<text>.*?)<!-- /readme -->", re.DOTALL)


def filled(readme: str, root: Path = ROOT) -> str:
    """Return the README with every section as its page has it."""
    return SECTION.sub(lambda found: found[1] + shared(root / found["page"]) + found[3], readme)


def shared(page: Path) -> str:
    """Return what a page gives to the README; one line that says so where it is not there yet."""
    found = SHARE.search(page.read_text(encoding="utf-8")) if page.exists() else None
    return found["text"] if found else f"*Not measured yet: {page.name} holds nothing for this.*\n"


def main(words: list[str]) -> int:
    """Write or check the README; return the exit code."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in words:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
