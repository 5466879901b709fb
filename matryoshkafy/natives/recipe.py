"""How a module is made: a function of a tree of plain values, found from a module or a builder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.natives.tree import Changes, changed

Shapes = Mapping[str, tuple[int, ...]]


class NativeError(MatryoshkafyError):
    """No configuration of the user's class computes what the slice computes."""


@dataclass(frozen=True)
class Recipe:
    """A class and the tree of values that it is made from.

    library: "hf", "timm", "open_clip" or "class". `make(tree)` builds the module with fresh
    weights; `source` is the module whose weights the traced path may have left unread.
    """

    name: str
    library: str
    tree: Any
    make: Callable[[Any], nn.Module]
    source: nn.Module | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def shapes(self, changes: Changes) -> Shapes | None:
        """Return the shape of every parameter and buffer, None where no such module is built."""
        key = tuple(sorted((repr(f), repr(v)) for f, v in changes.items()))
        if key not in self.memo:
            self.memo[key] = _shapes(self, changed(self.tree, changes))
        return self.memo[key]

    def build(self, changes: Changes) -> nn.Module:
        """Return the module in evaluation mode, with fresh weights on the CPU."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            return self.make(changed(self.tree, changes)).eval()


def _shapes(recipe: Recipe, tree: Any) -> Shapes | None:
    """Build where nothing is allocated; a class that reads values as it is built, on the CPU."""
    for device in recipe.memo.get("devices", ("meta", "cpu")):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                module = recipe.make(tree)
        except Exception:  # noqa: BLE001  a constructor may raise anything
            continue
        recipe.memo.setdefault("devices", (device,))
        return {name: tuple(t.shape) for name, t in tensors_of(module).items()}
    return None


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, ties under each of their names."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def recipe_of(like: Any) -> Recipe:
    """Return the recipe of a module, of a builder with defaults, or of `functools.partial`.

    Raises NativeError that says what was given and what is expected.
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


def _same(like: Any) -> Recipe | None:
    return like if isinstance(like, Recipe) else None


def _transformers(like: Any) -> Recipe | None:
    from matryoshkafy.natives import huggingface

    return huggingface.recipe(like)


def _timm(like: Any) -> Recipe | None:
    from matryoshkafy.natives import timm_models

    return timm_models.recipe(like)


def _open_clip(like: Any) -> Recipe | None:
    from matryoshkafy.natives import open_clip_models

    return open_clip_models.recipe(like)


def _builder(like: Any) -> Recipe | None:
    """A function or class with values for its arguments; its name is where it can be imported."""
    if isinstance(like, nn.Module) or not callable(like):
        return None
    function: Callable[..., Any] = like
    args, given = (), {}
    if isinstance(like, functools.partial):
        function, args, given = like.func, like.args, like.keywords
    tree = {**defaults(function), **given}
    return Recipe(_name(function), "class", tree, lambda t: function(*args, **t))


def _module(like: Any) -> Recipe | None:
    """A module of the user's: its constructor's arguments stand in its attributes."""
    if not isinstance(like, nn.Module):
        return None
    kind = type(like)
    wanted = list(_arguments(kind.__init__))[1:]
    tree = {**defaults(kind), **dict(_held(like, wanted))}
    missing = [p.name for p in wanted if p.name not in tree and p.default is p.empty]
    if missing:
        raise NativeError(
            f"{kind.__name__} takes {', '.join(missing)}, which its attributes do not tell; "
            f"give like=functools.partial({kind.__name__}, {missing[0]}=...), with the values that "
            "the model was built with."
        )
    return Recipe(_name(kind), "class", tree, lambda t: kind(**t), like)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function that have plain values of their own."""
    try:
        arguments = list(_arguments(function))
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in arguments if _is_number(p.default)}


def _arguments(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield parameter


def _held(module: nn.Module, wanted: list[inspect.Parameter]) -> Iterator[tuple[str, Any]]:
    for parameter in wanted:
        for name in (parameter.name, f"_{parameter.name}"):
            value = vars(module).get(name, inspect.Parameter.empty)
            if value is not inspect.Parameter.empty:
                yield parameter.name, value
                break


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(function: Any) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


FINDERS: tuple[Callable[[Any], Recipe | None], ...] = (
    _same,
    _transformers,
    _timm,
    _open_clip,
    _builder,
    _module,
)
