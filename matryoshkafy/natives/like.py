"""What builds a model: found from the model itself, or from a builder with its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from matryoshkafy.natives import huggingface, open_clip_models, timm_models
from matryoshkafy.natives.recipe import NativeError, Recipe, arguments, defaults


def recipe_of(like: object) -> Recipe:
    """Return the recipe of a module, of a builder with defaults, or of `functools.partial`.

    Args:
        like: how the user builds the model.

    Raises:
        NativeError: says what was given and what is expected.
    """
    for finder in FINDERS:
        found = finder(like)
        if found is not None:
            return found
    raise NativeError(
        f"like is a {type(like).__name__}; expected the model that was converted, or what builds "
        "it: a class or function whose arguments have values, such as functools.partial(Net, "
        "width=256, heads=8)."
    )


def _builder(like: object) -> Recipe | None:
    """A function or class with values for its arguments; its name is where it can be imported."""
    if isinstance(like, nn.Module) or not callable(like):
        return None
    function: Callable[..., Any] = like
    args, given = (), {}
    if isinstance(like, functools.partial):
        function, args, given = like.func, like.args, like.keywords
    tree = {**defaults(function), **given}
    return Recipe(_name(function), "class", tree, lambda t: function(*args, **t))


def _module(like: object) -> Recipe | None:
    """A module of the user's: its constructor's arguments stand in its attributes."""
    if not isinstance(like, nn.Module):
        return None
    kind = type(like)
    wanted = list(arguments(kind.__init__))[1:]
    tree = {**defaults(kind), **dict(_held(like, wanted))}
    missing = [p.name for p in wanted if p.name not in tree and p.default is p.empty]
    if missing:
        raise NativeError(
            f"{kind.__name__} takes {', '.join(missing)}, which its attributes do not tell; "
            f"give like=functools.partial({kind.__name__}, {missing[0]}=...), with the values that "
            "the model was built with."
        )
    return Recipe(_name(kind), "class", tree, lambda t: kind(**t), like)


def _held(module: nn.Module, wanted: list[inspect.Parameter]) -> Iterator[tuple[str, Any]]:
    for parameter in wanted:
        for name in (parameter.name, f"_{parameter.name}"):
            value = vars(module).get(name, inspect.Parameter.empty)
            if value is not inspect.Parameter.empty:
                yield parameter.name, value
                break


def _name(function: object) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


FINDERS: tuple[Callable[[Any], Recipe | None], ...] = (
    lambda like: like if isinstance(like, Recipe) else None,
    huggingface.recipe,
    timm_models.recipe,
    open_clip_models.recipe,
    _builder,
    _module,
)
