"""FunctionMode: what torch functions are called with, while a `with` lasts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from torch.overrides import TorchFunctionMode


class FunctionMode(TorchFunctionMode):
    """A mode that overrides `called`, which gets the function and its arguments alone.

    `WATCHED` are the functions that it is called for; thousands of others pass.
    """

    WATCHED: ClassVar[Collection[object]] = frozenset()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func in self.WATCHED:
            return self.called(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the result of a call."""
        return func(*args, **kwargs)
