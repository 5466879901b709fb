"""Models of open_clip: the tree is the configuration of a name, both towers in it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from matryoshkafy.natives.recipe import Recipe


def recipe(like: Any) -> Recipe | None:
    """Return the recipe of `functools.partial(open_clip.create_model, NAME)`, else None."""
    open_clip = sys.modules.get("open_clip")
    if open_clip is None or not isinstance(like, functools.partial) or not like.args:
        return None
    if like.func is not open_clip.create_model:
        return None
    name = str(like.args[0])
    tree = open_clip.get_model_config(name)
    return None if tree is None else Recipe(f"open_clip:{name}", "open_clip", tree, made)


def made(config: Mapping[str, Any]) -> nn.Module:
    """Return the module of a configuration, in the class that open_clip's factory takes."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    values = copy.deepcopy(dict(config))
    own_text = values.pop("custom_text", False) or "hf_model_name" in values.get("text_cfg", {})
    if not own_text:
        return CLIP(**values)
    return CoCa(**values) if "multimodal_cfg" in values else CustomTextCLIP(**values)


def config_of(module: nn.Module, tree: Any) -> dict[str, Any]:
    """Return arguments of a class of open_clip as its factory reads them from a file.

    The factory takes the class from which keys are there, so what is None is left out.
    """
    kind = type(module).__name__
    return {**_present(tree), **({"custom_text": True} if kind != "CLIP" else {})}


def _present(tree: Any) -> Any:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = dataclasses.asdict(tree)
    if isinstance(tree, Mapping):
        return {key: _present(value) for key, value in tree.items() if value is not None}
    return tree
