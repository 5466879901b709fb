"""user_frame(), error_line(): the innermost line of the user's own; HelperLines: their functions.

torch.export keeps the lines of functions that are called `forward`. A scale that a function of the
model's own file or package computes stands in none of them.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

import torch.fx.proxy
from torch import nn

from matryoshkafy.graph.nodes import TORCH_FOLDER, TRACING_FOLDER

Key = tuple[str, str]
# Files that are not the user's.
OTHERS = (TORCH_FOLDER, TRACING_FOLDER, "<")


def user_frame() -> FrameType | None:
    """Return the innermost frame that is neither torch's nor the tracer's; None where none is."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename.startswith(OTHERS):
        frame = frame.f_back
    return frame


def error_line(error: BaseException) -> str | None:
    """Return the innermost line of the user's own on an error's way; None where none is."""
    found, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(OTHERS):
            found = line_of(code, trace.tb_lineno)
        trace = trace.tb_next
    return found


def line_of(code: CodeType, number: int) -> str:
    """Return a line as plans and errors name it: "file:line (function)"."""
    return f"{code.co_filename}:{number} ({code.co_name})"


class HelperLines:
    """The functions of a model's own packages that a trace goes through, kept in its lines."""

    def __init__(self, model: nn.Module) -> None:
        self.packages = set(map(_package, {type(m).__module__ for m in model.modules()}))
        self.packages -= {"torch", _package(__name__)}
        # A torch that reads no such set gives the line of the forward around a function.
        self.anchors: set[Key] = getattr(torch.fx.proxy, "_STACK_TRACE_ANCHORS", set[Key]())
        self.added = set[Key]()

    def note(self) -> None:
        """Keep the function that calls torch now, where it is the model's own."""
        frame = user_frame()
        if frame is None or frame.f_code.co_name == "forward":
            return
        key = (frame.f_code.co_filename, frame.f_code.co_name)
        own = _package(frame.f_globals.get("__name__", "")) in self.packages
        if own and key not in self.anchors:
            self.anchors.add(key)
            self.added.add(key)

    def forget(self) -> None:
        """Leave torch as it was."""
        self.anchors -= self.added


def _package(module: str) -> str:
    return module.partition(".")[0]
