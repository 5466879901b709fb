"""Models of timm: the tree holds what the entry point of a name hands to the class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

from torch import nn

from matryoshkafy.natives.recipe import Recipe, defaults, library

Build = Callable[..., nn.Module]

# What the factory itself consumes; the class never sees it.
FACTORY = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay feature_cfg pretrained_strict "
    "pretrained_filter_fn cache_dir kwargs_filter pretrained_model_args".split()
)


def recipe(like: object) -> Recipe | None:
    """Return the recipe of a model of timm, or of `functools.partial(timm.create_model, NAME)`."""
    timm = sys.modules.get("timm")
    if timm is None:
        return None
    asked: object = like
    if isinstance(asked, functools.partial):
        held = cast("functools.partial[object]", asked)
        if held.func is timm.create_model and held.args:
            return _recipe(str(held.args[0]), held.keywords, None)
    cfg: Any = getattr(like, "pretrained_cfg", None)
    name = cast("Mapping[str, object]", cfg).get("architecture") if hasattr(cfg, "get") else None
    known = isinstance(name, str) and timm.is_model(name)
    if known and isinstance(like, nn.Module):
        given: Mapping[str, object] = getattr(like, "_model_args", {})
        return _recipe(str(name), given, like)
    return None


def _recipe(name: str, given: Mapping[str, object], source: nn.Module | None) -> Recipe:
    create = functools.partial(library("timm").create_model, name, **given)
    tree = handed(create)

    def make(new: Mapping[str, object]) -> nn.Module:
        try:
            return create(**asked(new, tree))
        except TypeError:
            other = {key: value for key, value in new.items() if value is not tree[key]}
            return _injected(create, other)

    return Recipe(f"timm:{name}", "timm", tree, make, source)


def asked(new: Mapping[str, object], tree: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that differ; of a dataclass its fields, which an entry point takes."""
    found: dict[str, object] = {}
    for key, value in new.items():
        if value is tree[key]:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            found |= {name: v for name, v in fields if v != getattr(tree[key], name)}
        else:
            found[key] = value
    return found


def handed(create: Callable[[], nn.Module]) -> dict[str, object]:
    """Return the arguments that an entry point hands to its class, and the class's defaults."""
    found: dict[str, object] = {}

    def record(build: Build, kind: Build, *args: object, **kwargs: object) -> object:
        found.update({k: v for k, v in kwargs.items() if k not in FACTORY})
        for key, value in defaults(kind).items():
            found.setdefault(key, value)
        return build(kind, *args, **kwargs)

    import torch

    with _building(record), contextlib.suppress(Exception), torch.device("meta"):
        create()
    return found


def _injected(create: Callable[[], nn.Module], other: Mapping[str, object]) -> nn.Module:
    """Where an entry point fixes an argument, it is replaced on the way to the class."""

    def replace(build: Build, kind: Build, *args: object, **kwargs: object) -> object:
        return build(kind, *args, **{**kwargs, **other})

    with _building(replace):
        return create()


@contextlib.contextmanager
def _building(instead: Callable[..., object]) -> Generator[None, None, None]:
    """Every model of timm is made by `build_model_with_cfg`, which each module holds by name."""
    build: Build = library("timm.models._builder").build_model_with_cfg
    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.") and vars(module).get("build_model_with_cfg") is build
    ]
    for module in holders:
        vars(module)["build_model_with_cfg"] = functools.partial(instead, build)
    try:
        yield
    finally:
        for module in holders:
            vars(module)["build_model_with_cfg"] = build
