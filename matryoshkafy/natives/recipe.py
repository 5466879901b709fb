"""How a module is made: a function of a tree of plain values, found from a module or a builder."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.graph.copies import forked, seed_torch
from matryoshkafy.graph.function_mode import FunctionMode
from matryoshkafy.graph.trace import tensors_of
from matryoshkafy.natives.tree import Changes, Tree, changed

Shapes = Mapping[str, tuple[int, ...]]
Foreign = Any
"""An object of a library that tells no types: a configuration, a model, a writer."""


class NativeError(MatryoshkafyError):
    """No configuration of the user's class computes what the slice computes."""


@dataclass(frozen=True)
class Recipe:
    """A class and the tree of values that it is made from.

    Args:
        name: of the class, or of the library's model.
        library: "hf", "timm", "open_clip" or "class".
        tree: the values.
        make: `make(tree)` builds the module with fresh weights.
        source: the module whose weights the traced path may have left unread.
        keywords: what the class takes beside its configuration.
        memo: what was found out about the class, kept for the next size.
    """

    name: str
    library: str
    tree: Tree
    make: Callable[[Tree], nn.Module]
    source: nn.Module | None = None
    keywords: Mapping[str, object] = field(default_factory=dict[str, object])
    memo: dict[object, Any] = field(default_factory=dict[object, Any], compare=False, repr=False)

    def shapes(self, changes: Changes) -> Shapes | None:
        """Return the shape of every parameter and buffer, None where no such module is built."""
        key = tuple(sorted((repr(f), repr(v)) for f, v in changes.items()))
        if key not in self.memo:
            self.memo[key] = _shapes(self, changed(self.tree, changes))
        return self.memo[key]

    def build(self, changes: Changes, *, hollow: bool = False) -> nn.Module:
        """Return the module in evaluation mode, with fresh weights on the CPU.

        hollow: parameters without memory (on the meta device); buffers are made as ever.
        """
        outline = without_memory() if hollow else contextlib.nullcontext()
        with forked(devices=[]), torch.device("cpu"), outline:
            seed_torch(0)
            return self.make(changed(self.tree, changes)).eval()


@contextlib.contextmanager
def without_memory() -> Generator[None, None, None]:
    """Move each parameter to the meta device as a module gets it; a tied one stays one object."""
    register = nn.Module.register_parameter

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = moved  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


FILLERS: frozenset[object] = frozenset(
    getattr(holder, name)
    for holder in (torch.Tensor, nn.init)
    for name in dir(holder)
    if name.endswith("_") and not name.startswith("_")
    # Those change which tensor it is, or its shape.
    if not name.startswith(
        (
            "requires_grad",
            "resize",
            "squeeze",
            "unsqueeze",
            "t_",
            "transpose",
            "swap",
            "as_strided",
            "set_",
            "rename",
            "share",
            "detach",
            "sparse",
        )
    )
)
"""What writes initial values into a tensor, and returns it."""


class _Unfilled(FunctionMode):
    """A tensor without memory keeps no initial values: none are drawn, which took longest."""

    WATCHED = FILLERS

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def _shapes(recipe: Recipe, tree: Tree) -> Shapes | None:
    """Build where nothing is allocated; a class that reads values as it is built, on the CPU."""
    for device in recipe.memo.get("devices", ("meta", "cpu")):
        try:
            with forked(devices=[]), torch.device(device), _Unfilled():
                module = recipe.make(tree)
        except Exception:  # noqa: BLE001  a constructor may raise anything
            continue
        recipe.memo.setdefault("devices", (device,))
        return {name: tuple(t.shape) for name, t in tensors_of(module).items()}
    return None


def library(name: str) -> Any:
    """Return a library that need not be installed; what it gives has no types that we could use."""
    return importlib.import_module(name)


def tables_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return by name what a state_dict does not show: hidden buffers, tensors held as attributes.

    A class makes those anew each time it is built.
    """
    shown = module.state_dict().keys()
    parts = cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
    held = {
        f"{path}.{key}" if path else key: value
        for path, part in parts
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }
    hidden = dict(module.named_buffers(remove_duplicate=False))
    return held | {name: table for name, table in hidden.items() if name not in shown}


def defaults(function: Callable[..., object]) -> dict[str, object]:
    """Return the arguments of a function that have plain values of their own."""
    try:
        found = list(arguments(function))
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in found if _is_number(p.default)}


def arguments(function: Callable[..., object]) -> Iterator[inspect.Parameter]:
    """Yield what a function takes by name."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield parameter


def _is_number(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return len(items) > 0 and all(map(_is_number, items))
    return isinstance(value, (int, float)) and not isinstance(value, bool)
