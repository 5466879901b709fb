"""Models of transformers: the tree is the configuration, as config.json would hold it."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from matryoshkafy.natives.recipe import NativeError, Recipe, library
from matryoshkafy.natives.source import Source
from matryoshkafy.natives.tree import Tree

Tables = Mapping[str, Tree]


def recipe(like: object) -> Recipe | None:
    """Return the recipe of a model of transformers, None for anything else."""
    config: Any = getattr(like, "config", None)
    if not isinstance(like, nn.Module) or not hasattr(config, "to_diff_dict"):
        return None
    return _recipe(type(like), config, like)


def from_source(source: Source) -> Recipe:
    """Return the recipe of the configuration that a checkpoint keeps; no code of it is run."""
    transformers = library("transformers")
    held = source.config()
    name = (held.get("architectures") or [""])[0]
    kind: Any = getattr(transformers, name, None) if name else transformers.AutoModel
    if kind is None:
        code = (
            "its auto_map names code of its own, which is not run. " if "auto_map" in held else ""
        )
        raise NativeError(
            f"the configuration of {source.name} is of a {name}, which transformers "
            f"{transformers.__version__} does not know; {code}Build the model yourself, and give "
            "it as like."
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(source.files["config.json"])
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if kind is transformers.AutoModel:
        kind = transformers.MODEL_MAPPING[type(config)]
    found = _recipe(kind, config, None)
    return dataclasses.replace(found, tree=uncached(found.tree))


def _recipe(kind: Any, config: Any, source: nn.Module | None) -> Recipe:
    attention = getattr(config, "_attn_implementation", None)

    def make(tree: Tree) -> nn.Module:
        more = {"attn_implementation": attention} if isinstance(attention, str) else {}
        return kind._from_config(type(config).from_dict(tree), **more)

    return Recipe(f"{kind.__module__}:{kind.__name__}", "hf", config.to_dict(), make, source)


def write(module: Any, folder: Path, source: Source | None, original: Any = None) -> None:
    """Write a model as transformers does, with the side files of its source.

    original: the full model, whose way to generate is kept.
    """
    if hasattr(original, "generation_config"):
        module.generation_config = copy.deepcopy(original.generation_config)
    module.save_pretrained(folder)
    path = folder / "config.json"
    first: Tree = {} if source is None else source.config()
    path.write_text(json.dumps(_cached(json.loads(path.read_text()), first), indent=2))
    files: Mapping[str, bytes] = {} if source is None else source.files
    for name, content in files.items():
        if name != "config.json":
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _cached(tree: Tree, first: Tree) -> Tree:
    """A trace needs a model without a cache; what generates needs it: as it was at first."""
    if not isinstance(tree, Mapping):
        return tree
    held = cast("Tables", first if isinstance(first, Mapping) else {})
    new = {key: _cached(value, held.get(key)) for key, value in cast("Tables", tree).items()}
    return {**new, "use_cache": held.get("use_cache", True)} if "use_cache" in new else new


def uncached(tree: Tree) -> Tree:
    """Return a configuration of a model that returns no cache, in every part."""
    if not isinstance(tree, Mapping):
        return tree
    new = {key: uncached(value) for key, value in cast("Tables", tree).items()}
    return {**new, "use_cache": False} if "use_cache" in new else new


def load(folder: Path, kind: str) -> Any:
    """Return the model of a folder in a class of transformers."""
    return getattr(library("transformers"), kind).from_pretrained(folder, local_files_only=True)
