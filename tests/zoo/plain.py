"""An outcome's text, fit for a table of results."""

from __future__ import annotations

import re


def plain(text: str) -> str:
    """Return a text without bars, lines, and the folders of the machine that it was said on."""
    text = re.sub(r"/\S*/site-packages/", "", text.replace("\n", " "))
    text = re.sub(r"/\S*?/(?=(tests|matryoshkafy)/)", "", text)
    return re.sub(r"/tmp/\S*", "FOLDER", text).replace("|", "/")
