"""Forwards that differentiate or map themselves: torch.autograd.grad, torch.func, torch.vmap.

A trace that stands above autograd does not see what a gradient reads of the forward: activations
of the example would become constants of the graph. Below autograd every op of both is recorded.
"""

# torch has no public name for what tells whether a transform is at work.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from matryoshkafy.graph.casts import CASTS, GET_DTYPE, TYPED, asks_type, cast
from matryoshkafy.graph.function_mode import FunctionMode
from matryoshkafy.graph.nodes import TORCH_FOLDER
from matryoshkafy.graph.paths import READERS, note_read
from matryoshkafy.graph.splits import DIMS, pieces_of
from matryoshkafy.graph.user_lines import HelperLines

GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
DERIVATIVES: frozenset[object] = frozenset(
    (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
)
# What tells a forward whether a value has a gradient; torch's own code asks, too.
READS: frozenset[object] = frozenset(
    (
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
        torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad_,
    )
)
HOOKS: frozenset[object] = frozenset((torch.Tensor.register_hook, torch.Tensor.retain_grad))


class Transformed(Exception):  # noqa: N818  a message to the tracer, which the user never meets
    """The forward differentiates or maps itself."""


class GradientsRead(Exception):  # noqa: N818  a message to the tracer, which the user never meets
    """The forward asks whether a value has a gradient."""


@contextlib.contextmanager
def watched(
    model: nn.Module, *, above: bool, gradients: bool = True, recorded: bool = False
) -> Generator[list[str]]:
    """Watch what a model calls while it is traced: x.data is x.detach(), which a trace sees.

    Yields the remarks on lines that ask for the type of a value, as they are met. With `above`, the
    trace stands above autograd, and a derivative or a map ends it. Without `gradients` no parameter
    has one, and a forward that would notice ends it. What ended it is raised, also where the
    forward caught it. A `recorded` path holds the values that it reads, which its graph notes.
    """
    mode = _Traced(HelperLines(model), above=above, gradients=gradients, recorded=recorded)
    try:
        with _around_forward(model, mode):
            yield mode.notes
    finally:
        mode.lines.forget()
    if mode.ended is not None:
        raise mode.ended


@contextlib.contextmanager
def _around_forward(model: nn.Module, mode: _Traced) -> Generator[None]:
    """Put a mode around a model's forward: tracing itself calls torch's functions four times as
    often as the forward does. Hooks of the model itself lie outside, so there it is around all.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        with mode:
            yield
        return
    forward = model.forward

    @functools.wraps(forward)
    def inner(*args: object, **kwargs: object) -> object:
        with mode:
            return forward(*args, **kwargs)

    own = vars(model).get("forward")
    model.forward = inner
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


class _Traced(FunctionMode):
    """What a forward calls while it is traced; see `watched`."""

    WATCHED = (
        {GET_DATA, GET_DTYPE} | DERIVATIVES | READS | HOOKS | DIMS.keys() | CASTS | TYPED | READERS
    )

    def __init__(self, lines: HelperLines, *, above: bool, gradients: bool, recorded: bool) -> None:
        super().__init__()
        self.lines = lines
        self.above, self.gradients, self.recorded = above, gradients, recorded
        self.ended: Exception | None = None
        self.notes: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.above and _within_transform() and not _ends_transform(func):
            raise self._end(Transformed("the forward maps itself"))
        self.lines.note()
        return super().__torch_function__(func, types, args, kwargs)

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func == GET_DATA:
            return args[0].detach()
        if self.above and func in DERIVATIVES:
            raise self._end(Transformed("the forward differentiates itself"))
        if not self.gradients and (func in HOOKS or (func in READS and _by_user())):
            raise self._end(GradientsRead("the forward asks for a gradient"))
        if self.recorded and func in READERS:
            note_read(func, args, kwargs)
        if func in DIMS:
            return pieces_of(func, args, kwargs)
        if func in CASTS or func in TYPED:
            return cast(func, args, kwargs)
        if func == GET_DTYPE and (note := asks_type(args[0])) and note not in self.notes:
            self.notes.append(note)
        return func(*args, **kwargs)

    def _end(self, error: Exception) -> Exception:
        self.ended = error
        return error


def _by_user() -> bool:
    """Tell whether the call at hand is written in code that is none of torch's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back  # a mode, ours or torch's own
    return frame is not None and not frame.f_code.co_filename.startswith(TORCH_FOLDER)


def _ends_transform(func: Callable[..., Any]) -> bool:
    """Tell whether a transform leaves with this call, which it must, whatever ended it."""
    return getattr(func, "__name__", "").endswith(("_nesting", "_dual_level"))


def _within_transform() -> bool:
    """Tell whether torch.func or torch.vmap calls the op at hand."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
