"""Folders of sentence-transformers: the encoder, and the modules behind it."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn

from matryoshkafy.natives import huggingface
from matryoshkafy.natives.native import Native
from matryoshkafy.natives.recipe import Foreign, NativeError, Recipe
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
        library, _, kind = str(module["type"]).rpartition(".")
        if not library.startswith("sentence_transformers"):
            raise NativeError(
                f"{source.name} names the class {module['type']}; expected classes of "
                "sentence_transformers, because other code is never run. Save the encoder with "
                "to='hf'."
            )
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

    with huggingface.quietly():
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def encoder_of(model: Foreign) -> nn.Module:
    """Return the model that was sliced: of a SentenceTransformer, the encoder in it."""
    first = getattr(model, "_first_module", None)
    if first is None:
        return model
    held = first()
    return getattr(held, "auto_model", None) or held.model


def is_whole(names: Iterable[str]) -> bool:
    """Tell whether tensors are of a whole SentenceTransformer, whose first module is called 0."""
    return all(name.startswith("0.") for name in names)


def recipe(source: Source) -> Recipe:
    """Return the recipe of a whole SentenceTransformer: the encoder's, inside its own modules."""
    check(source)
    inner = huggingface.from_source(source)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.write(inner.build({}), Path(folder), source)
        whole = load(Path(folder))
    encoder = encoder_of(whole)
    held = cast("dict[str, object]", vars(whole._first_module()))
    apart = tuple(v for v in held.values() if not isinstance(v, (dict, list)))

    def make(tree: Any) -> nn.Module:
        """The encoder anew, all that holds no weights as it is."""
        kept: dict[int, object] = {id(v): v for v in (*apart, whole.tokenizer)}
        return copy.deepcopy(whole, {**kept, id(encoder): inner.make(tree)})

    return dataclasses.replace(inner, make=make, memo={})


def inside(native: Native) -> Native:
    """Return the encoder of a whole SentenceTransformer as a native model of its own."""
    encoder = encoder_of(native.module)
    parts = cast("Iterable[tuple[str, nn.Module]]", native.module.named_modules())
    path = next(name for name, part in parts if part is encoder) + "."
    tables, unread = (
        tuple(name.removeprefix(path) for name in names) for names in (native.tables, native.unread)
    )
    return dataclasses.replace(native, module=encoder, tables=tables, unread=unread)
