"""Models of open_clip: the tree is the configuration of a name, both towers in it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from matryoshkafy.natives.recipe import Recipe, library
from matryoshkafy.natives.tree import Tree


def recipe(like: object) -> Recipe | None:
    """Return the recipe of `functools.partial(open_clip.create_model, NAME)`, else None."""
    open_clip = sys.modules.get("open_clip")
    if open_clip is None or not isinstance(like, functools.partial) or not like.args:
        return None
    if like.func is not open_clip.create_model:
        return None
    name = str(like.args[0])
    tree = open_clip.get_model_config(name)
    return None if tree is None else Recipe(f"open_clip:{name}", "open_clip", tree, _made)


def _made(config: Mapping[str, object]) -> nn.Module:
    """Return the module of a configuration, in the class that open_clip's factory takes."""
    values: dict[str, Any] = copy.deepcopy(dict(config))
    own_text = values.pop("custom_text", False) or "hf_model_name" in values.get("text_cfg", {})
    if "multimodal_cfg" in values and own_text:
        return library("open_clip.coca_model").CoCa(**values)
    models = library("open_clip.model")
    return models.CustomTextCLIP(**values) if own_text else models.CLIP(**values)


def config_of(module: nn.Module, tree: Tree) -> dict[str, Tree]:
    """Return arguments of a class of open_clip as its factory reads them from a file.

    The factory takes the class from which keys are there, so what is None is left out.
    """
    kind = type(module).__name__
    return {**_present(tree), **({"custom_text": True} if kind != "CLIP" else {})}


def _present(tree: Tree) -> Tree:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _present(dataclasses.asdict(tree))
    if isinstance(tree, Mapping):
        given = cast("Mapping[str, Tree]", tree).items()
        return {key: _present(value) for key, value in given if value is not None}
    return tree
