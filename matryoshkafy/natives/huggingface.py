"""Models of transformers: the tree is the configuration, as config.json would hold it."""

from __future__ import annotations

from typing import Any

from torch import nn

from matryoshkafy.natives.recipe import Recipe


def recipe(like: Any) -> Recipe | None:
    """Return the recipe of a model of transformers, None for anything else."""
    config: Any = getattr(like, "config", None)
    if not isinstance(like, nn.Module) or not hasattr(config, "to_diff_dict"):
        return None
    kind = type(like)
    attention = getattr(config, "_attn_implementation", None)

    def make(tree: Any) -> nn.Module:
        small = config_of(config, tree)
        more = {"attn_implementation": attention} if isinstance(attention, str) else {}
        return kind._from_config(small, **more)  # type: ignore[attr-defined]

    return Recipe(f"{kind.__module__}:{kind.__name__}", "hf", config.to_dict(), make, like)


def config_of(config: Any, tree: Any) -> Any:
    """Return a configuration of the same class that holds the values of a tree."""
    return type(config).from_dict(tree)
