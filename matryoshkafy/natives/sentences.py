"""Folders of sentence-transformers: the encoder, and the modules behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matryoshkafy.natives.recipe import NativeError
from matryoshkafy.natives.source import Source
from matryoshkafy.natives.tree import changed, numbers

# Modules that hold no weights: they follow the width of what comes in.
WEIGHTLESS = ("Transformer", "Pooling", "Normalize")


def check(source: Source) -> None:
    """Raise NativeError where a module behind the encoder has weights of its own."""
    for module in json.loads(source.files["modules.json"]):
        kind = str(module["type"]).rpartition(".")[2]
        if kind not in WEIGHTLESS:
            raise NativeError(
                f"{source.name} has the module {kind} behind its encoder, with weights that this "
                f"checkpoint does not hold; expected {', '.join(WEIGHTLESS)}. Convert the whole "
                "SentenceTransformer in Python, or save the encoder with --to hf."
            )


def resize(folder: Path, widths: tuple[int, int]) -> None:
    """Let the modules behind the encoder take another width.

    widths: of the full model, and of this one.
    """
    full, small = widths
    for module in json.loads((folder / "modules.json").read_text()):
        path = folder / module["path"] / "config.json"
        if module["path"] and path.is_file():
            config = json.loads(path.read_text())
            new = {field: small for field, value in numbers(config) if value == full}
            path.write_text(json.dumps(changed(config, new), indent=2))


def load(folder: Path) -> Any:
    """Return the SentenceTransformer of a folder, on the CPU."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
