"""Forwards that differentiate or map themselves: torch.autograd.grad, torch.func, torch.vmap.

A trace that stands above autograd does not see what a gradient reads of the forward: activations
of the example would become constants of the graph. Below autograd every op of both is recorded.
"""

# torch has no public name for what tells whether a transform is at work.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from matryoshkafy.graph.function_mode import FunctionMode

GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
DERIVATIVES: tuple[object, ...] = (  # pyright: ignore[reportUnknownVariableType]
    torch.autograd.grad,
    torch.autograd.backward,
    torch.Tensor.backward,
)


class Transformed(Exception):  # noqa: N818  a message to the tracer, which the user never meets
    """The forward differentiates or maps itself."""


class Traced(FunctionMode):
    """What a forward calls while it is traced: x.data is x.detach(), which a trace sees.

    With `above`, the trace stands above autograd, and a derivative or a map ends it.
    """

    def __init__(self, *, above: bool) -> None:
        super().__init__()
        self.above = above

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func == GET_DATA:
            return args[0].detach()
        if self.above and (func in DERIVATIVES or _within_transform()):
            raise Transformed("the forward differentiates or maps itself")
        return func(*args, **kwargs)


def _within_transform() -> bool:
    """Tell whether torch.func or torch.vmap calls the op at hand."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
