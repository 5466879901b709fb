"""Models of transformers: the tree is the configuration, as config.json would hold it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Generator, Mapping, Set
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from matryoshkafy.graph.copies import forked
from matryoshkafy.graph.trace import tensors_of
from matryoshkafy.natives.recipe import Foreign, NativeError, Recipe, arguments, library
from matryoshkafy.natives.source import Source
from matryoshkafy.natives.tree import Tree

Tables = Mapping[str, Tree]

MOST_SWITCHES = 6


def recipe(like: object) -> Recipe | None:
    """Return the recipe of a model of transformers, None for anything else."""
    config: Foreign = getattr(like, "config", None)
    if not isinstance(like, nn.Module) or not hasattr(config, "to_diff_dict"):
        return None
    return _recipe(type(like), config, like)


def from_source(source: Source) -> Recipe:
    """Return the recipe of the configuration that a checkpoint keeps; no code of it is run."""
    transformers = library("transformers")
    held = source.config()
    name = (held.get("architectures") or [""])[0]
    kind: Foreign = getattr(transformers, name, None) if name else transformers.AutoModel
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


def _recipe(kind: Foreign, config: Foreign, source: nn.Module | None) -> Recipe:
    attention = getattr(config, "_attn_implementation", None)
    more = {"attn_implementation": attention} if isinstance(attention, str) else {}

    def maker(keywords: Mapping[str, object]) -> Callable[[Tree], nn.Module]:
        read = cast(Any, type(config)).from_dict

        def make(tree: Tree) -> nn.Module:
            return kind._from_config(read(tree), **more, **keywords)

        return make

    tree = config.to_dict()
    keywords = {} if source is None else _keywords(kind, source, lambda k: maker(k)(tree))
    name = f"{kind.__module__}:{kind.__name__}"
    return Recipe(name, "hf", tree, maker(keywords), source, keywords)


def _keywords(
    kind: Foreign, source: nn.Module, build: Callable[[Mapping[str, object]], nn.Module]
) -> dict[str, object]:
    """Return what the constructor took beside the configuration, such as add_pooling_layer=False.

    No attribute tells it: of the switches that it has, those that give the names of the model.
    """
    switches = [p.name for p in arguments(kind.__init__) if isinstance(p.default, bool)]
    wanted = tensors_of(source).keys()
    for number in range(len(switches[:MOST_SWITCHES]) + 1):
        for some in itertools.combinations(switches[:MOST_SWITCHES], number):
            defaults = {p.name: p.default for p in arguments(kind.__init__)}
            keywords: dict[str, object] = {name: not defaults[name] for name in some}
            if _names(build, keywords) == wanted:
                return keywords
    return {}


def _names(
    build: Callable[[Mapping[str, object]], nn.Module], keywords: Mapping[str, object]
) -> Set[str] | None:
    try:
        with forked(devices=[]), torch.device("meta"):
            return tensors_of(build(keywords)).keys()
    except Exception:  # noqa: BLE001  a constructor may raise anything
        return None


def untied(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> Recipe:
    """Return the recipe of a slice whose head has a weight of its own, where the config ties it."""
    tie = "tie_word_embeddings"
    if recipe.library != "hf" or recipe.tree.get(tie) is not True:
        return recipe
    model = recipe.source
    if model is None:
        with forked(devices=[]), torch.device("meta"):
            model = recipe.make(recipe.tree)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    own = any(
        {head, table} <= tensors.keys() and tensors[head].data_ptr() != tensors[table].data_ptr()
        for head, table in ties.items()
    )
    return dataclasses.replace(recipe, tree={**recipe.tree, tie: False}) if own else recipe


def write(module: Foreign, folder: Path, source: Source | None, original: Foreign = None) -> None:
    """Write a model as transformers does, with the side files of its source.

    original: the full model, whose way to generate is kept.
    """
    _keep_generation(module, original)
    with quietly():
        module.save_pretrained(folder)
    _write_side(folder, source)


@contextlib.contextmanager
def quietly() -> Generator[None, None, None]:
    """Let transformers draw no progress bars."""
    told = library("transformers.utils.logging")
    shown = told.is_progress_bar_enabled()
    told.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            told.enable_progress_bar()


def mark(folder: Path, dimensions: tuple[int, ...]) -> None:
    """Tell embedding servers which dimensions a vector may be cut to, as they read config.json."""
    path = folder / "config.json"
    told = {"is_matryoshka": True, "matryoshka_dimensions": list(dimensions)}
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}, indent=2))


def write_config(module: Foreign, folder: Path, source: Source | None, original: Foreign) -> None:
    """Write what `write` does, without the weights."""
    _keep_generation(module, original)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = str(dtype).removeprefix("torch.") if dtype else None
    config.save_pretrained(folder)
    if module.can_generate():
        module.generation_config.save_pretrained(folder)
    _write_side(folder, source)


def _keep_generation(module: Foreign, original: Foreign) -> None:
    if hasattr(original, "generation_config"):
        module.generation_config = copy.deepcopy(original.generation_config)


def _write_side(folder: Path, source: Source | None) -> None:
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


def load(folder: Path, kind: str, keywords: Mapping[str, object]) -> Foreign:
    """Return the model of a folder in a class of transformers.

    Args:
        folder: where it is.
        kind: the name of the class.
        keywords: what its constructor takes beside the configuration.
    """
    found = getattr(library("transformers"), kind)
    with quietly():
        return found.from_pretrained(folder, local_files_only=True, **keywords)
