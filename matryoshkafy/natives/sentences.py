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
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"),
    "sentencepiece.bpe.model",
)


def check(source: Source | None) -> None:
    """Raise NativeError where no source or tokenizer is known, or a module behind has weights."""
    if source is None or "modules.json" not in source.files:
        raise NativeError(
            "to='st' was given, but no folder of sentence-transformers is known; expected one "
            "with modules.json. Give source=FOLDER when saving the doll, or like=FOLDER, or save "
            "with to='hf'."
        )
    if not any(name.rpartition("/")[2] in VOCABULARIES for name in source.files):
        raise NativeError(
            f"{source.name} holds no tokenizer; expected one of {', '.join(VOCABULARIES)}, without "
            "which no text becomes a vector. Copy it into the folder and convert again."
        )
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
