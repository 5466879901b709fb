"""Every size in one folder of transformers, each weight stored once; see `MatryoshkaConfig`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import parts_of, slice
from matryoshkafy.files.packing import pack
from matryoshkafy.graph.trace import tensors_of
from matryoshkafy.natives import huggingface, sentences, sized
from matryoshkafy.natives.card import card_of_every
from matryoshkafy.natives.inputs import Call
from matryoshkafy.natives.native import Native, find
from matryoshkafy.natives.places import MARK
from matryoshkafy.natives.quantizer import MatryoshkaConfig
from matryoshkafy.natives.recipe import Foreign, NativeError, Recipe, library
from matryoshkafy.natives.source import SOURCE, Source
from matryoshkafy.natives.tree import Changes

LIBRARIES = ("hf", "st")
CONFIG = "config.json"


@dataclass(frozen=True)
class Whole:
    """A doll with all that its folder tells: how its class is built, its side files."""

    doll: Doll
    recipe: Recipe
    source: Source | None
    spare: Callable[[], Mapping[str, Tensor]] | None
    inputs: Call | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes, ascending."""
        return tuple(parts_of(self.doll)[1].sizes)


def check(to: str, whole: Whole) -> None:
    """Raise NativeError where a library has no way to cut while it loads."""
    recipe, source = whole.recipe, whole.source
    if to not in LIBRARIES or recipe.library != "hf":
        raise NativeError(
            f"a doll was given to be saved to {to!r}, as a {recipe.name}; expected a model of "
            f"transformers with to={' or to='.join(map(repr, LIBRARIES))}, whose loader can cut a "
            "size, or one size. Save mk.slice(doll, size) instead."
        )
    if sentences.is_whole(parts_of(whole.doll)[1].parameters):
        raise NativeError(
            "a doll of a whole SentenceTransformer was given; expected one of its encoder, whose "
            "sizes one folder can hold. Save each size (slice --all --to st), or convert the "
            "encoder: AutoModel.from_pretrained(FOLDER)."
        )
    if to == "st":
        sentences.check(source)


def write(whole: Whole, folder: Path) -> None:
    """Write every size into an empty folder, and compare what `from_pretrained` makes of each.

    Raises NativeError where a size has no configuration, or loads as something else.
    """
    side = {} if whole.source is None else {SOURCE: whole.source.to_json().encode()}
    pack(whole.doll, folder, side=side)
    largest = _found(whole, whole.sizes[-1])
    huggingface.write_config(largest.module, folder, whole.source, largest.recipe.source)
    _write_names(largest.module, folder)
    fields: dict[int, Changes] = {}
    parameters: dict[int, int] = {}
    for size in reversed(whole.sizes):
        native = largest if size == whole.sizes[-1] else _found(whole, size)
        fields[size] = native.changes
        parameters[size] = sum(p.numel() for p in native.module.parameters())
        _write_size(native, folder, (size, fields))
        _compare(native, folder, size)
    name = f"{type(largest.module).__module__}:{type(largest.module).__name__}"
    described = {"format": 1, "library": "hf", "class": name, "sizes": list(whole.sizes)}
    (folder / MARK).write_text(json.dumps(described, indent=1))
    original = None if whole.source is None else whole.source.files.get("README.md")
    text = card_of_every(name.rpartition(":")[2], parameters, (original or b"").decode())
    (folder / "README.md").write_text(text)


def _found(whole: Whole, size: int) -> Native:
    small = slice(whole.doll, size)
    native = find(small, whole.recipe, spare=whole.spare, inputs=whole.inputs)
    if size == whole.sizes[-1] and native.changes:
        raise NativeError(
            f"the largest size of the doll is not its {whole.recipe.name} itself: "
            f"{native.changes}. Give like=MODEL, the model that was converted."
        )
    return native


def _write_names(module: nn.Module, folder: Path) -> None:
    """The loader asks for values of the names that it finds; tied tensors have one name."""
    names: dict[int, tuple[str, torch.dtype]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), (name, tensor.dtype))
    held = {name: torch.empty(0, dtype=dtype) for name, dtype in names.values()}
    library("safetensors.torch").save_file(held, str(folder / sized.NAMES), {"format": "pt"})


def _write_size(native: Native, folder: Path, what: tuple[int, Mapping[int, Changes]]) -> None:
    size, fields = what
    config = json.loads((folder / CONFIG).read_text())
    held = sized.held_fields(dict(sorted(fields.items())))
    (folder / CONFIG).write_text(json.dumps({**config, sized.KEY: held}, indent=2))
    if native.unread and native.changes:
        state = tensors_of(native.module)
        spare = {name: state[name].detach().contiguous() for name in native.unread}
        library("safetensors.torch").save_file(
            spare, str(folder / sized.spare_file(size)), {"format": "pt"}
        )


def _compare(native: Native, folder: Path, size: int) -> None:
    kind: Foreign = type(native.module)
    config = MatryoshkaConfig(size=size)
    loaded = kind.from_pretrained(
        folder, quantization_config=config, dtype=None, **native.recipe.keywords
    )
    ours, theirs = native.module.state_dict(), loaded.state_dict()
    off = sorted(n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n]))
    if off:
        raise NativeError(
            f"{kind.__name__} of size {size} was written, but transformers loads other values of "
            f"{', '.join(off[:3])}. Save the size alone: mk.slice(doll, {size})."
        )
