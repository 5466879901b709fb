"""Where a model came from: its configuration and side files, which a checkpoint keeps."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshkafy.natives.recipe import NativeError

SOURCE = "source.json"
FORMAT = 1
LIBRARIES = ("hf", "st", "timm", "open_clip", "class")
LARGEST = 64 * 2**20
PART = re.compile(r"[A-Za-z0-9_][\w.\-]{0,99}", re.ASCII)
# Texts and vocabularies; never weights, and never code.
KEPT = (".json", ".txt", ".md", ".model", ".jinja", ".tiktoken", ".bpe")
LEFT = re.compile(r".*\.index\.json|matryoshka\.json|graph\.json|native\.json|source\.json")


@dataclass(frozen=True)
class Source:
    """What a native size is made from besides the weights.

    library: "hf", "st", "timm", "open_clip" or "class"; name: of the folder, of the model in its
    library, or `package.module:build`; files: side files by their path in the folder.
    """

    library: str
    name: str
    files: Mapping[str, bytes]

    def to_json(self) -> str:
        """Return the source as JSON text; files that are no text in base 64."""
        files = {name: _packed(content) for name, content in self.files.items()}
        return json.dumps(
            {"format": FORMAT, "library": self.library, "name": self.name, "files": files}, indent=1
        )

    def config(self, name: str = "config.json") -> Any:
        """Return a JSON file of the source as plain values."""
        if name not in self.files:
            raise NativeError(
                f"the source {self.name!r} holds no {name}; expected the folder of a model. "
                "Convert from a folder that has one."
            )
        return json.loads(self.files[name])


def source_of(folder: str | Path) -> Source:
    """Return the configuration and side files of a model's folder: no weights, no code.

    Raises NativeError where there is no config.json.
    """
    root = Path(folder)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in _side_files(root)}
    if "config.json" not in files:
        raise NativeError(
            f"{folder} was given as source, but holds no config.json; expected the folder that the "
            "model was loaded from. Check the path."
        )
    return Source("st" if "modules.json" in files else "hf", root.resolve().name, files)


def source_from_json(text: str | bytes) -> Source:
    """Read what `Source.to_json` wrote; raises NativeError for anything else."""
    try:
        data = json.loads(text)
        files = {check_path(name): _unpacked(held) for name, held in data["files"].items()}
        source = Source(data["library"], str(data["name"]), files)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise NativeError(
            f"the {SOURCE} of this checkpoint cannot be read ({error}); expected what convert "
            "wrote. The file is damaged: convert again."
        ) from error
    if source.library not in LIBRARIES:
        raise NativeError(
            f"{SOURCE} names the library {source.library!r}; expected one of "
            f"{', '.join(LIBRARIES)}. Upgrade matryoshkafy."
        )
    return source


def check_path(name: str) -> str:
    """Return the path of a side file; raises NativeError where it leads out of the folder."""
    parts = name.split("/")
    if len(parts) > 3 or not all(PART.fullmatch(part) for part in parts):
        raise NativeError(
            f"a side file is called {name!r}; expected plain names of letters, digits, '_', '-' "
            "and '.', at most two folders deep. The checkpoint is damaged: convert again."
        )
    return name


def _side_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        plain = all(PART.fullmatch(part) for part in name.split("/")) and name.count("/") < 3
        named = path.suffix in KEPT or path.stem.upper() in ("LICENSE", "LICENCE", "NOTICE")
        wanted = plain and named and not LEFT.fullmatch(path.name)
        if wanted and path.is_file() and path.stat().st_size <= LARGEST:
            yield path


def _packed(content: bytes) -> Any:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode("ascii")}


def _unpacked(held: Any) -> bytes:
    if isinstance(held, str):
        return held.encode("utf-8")
    return base64.b64decode(held["base64"], validate=True)
