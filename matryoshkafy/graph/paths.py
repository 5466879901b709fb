"""A recorded path depends on values: what the forward read of them is checked at every call.

    path         a tensor that Python read (bool, item, tolist, numpy) holds what it held
    path_size    as many rows were found (nonzero, a mask as an index)

Both return nothing, and stay in every graph that is made of the recorded one.
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from matryoshkafy.errors import GuardError, TraceError
from matryoshkafy.graph.user_lines import line_of, user_frame

# How the remark on a recorded path ends where all that it read is checked.
CHECKED = "what it read is checked at every call"
MAKERS: frozenset[object] = frozenset(
    (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
)
READERS: frozenset[object] = MAKERS | frozenset(
    (
        *(
            getattr(torch.Tensor, name)
            for name in (
                "item",
                "tolist",
                "numpy",
                "__array__",
                "__bool__",
                "__int__",
                "__float__",
                "__index__",
                "__complex__",
                "__contains__",
                "equal",
                "allclose",
                "is_nonzero",
            )
        ),
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    )
)
# As far off as another device rounds; a number that was read is a constant of the graph.
ROUNDED = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
LIBRARY_FOLDER = str(Path(__file__).parents[1])
MOST = 1 << 16  # values that a graph may hold of one read
library: Any = torch.library  # torch leaves its functions without types
LIBRARY = library.Library("matryoshkafy", "FRAGMENT")


def refusal(where: str) -> str:
    """Return what a call of another path is told; `where` may come out of a file."""
    at = "".join(c if c.isprintable() else "?" for c in where) or "an unknown line"
    return (
        f"the forward was recorded along the path of its example inputs, and what it read of "
        f"values at {at} is something else in this call. Convert with an example that takes the "
        "path you need, or rewrite that line with operations of one path (torch.where, masks)."
    )


def path(value: Tensor, expected: list[float], where: str) -> None:
    """Raise `GuardError` where a tensor does not hold what the recorded path read of it."""
    if value.numel() * (1 + value.is_complex()) != len(expected) or not bool(same(value, expected)):
        raise GuardError(refusal(where))


def same(value: Tensor, expected: list[float]) -> Tensor:
    """Return whether a tensor holds so many numbers, as one bool."""
    found, off = _numbers(value), ROUNDED.get(value.dtype, 0.0)
    wanted = torch.tensor(expected, dtype=torch.float64, device=found.device)
    return torch.isclose(found, wanted, off, off, equal_nan=True).all()


def _numbers(value: Tensor) -> Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.detach().reshape(-1).to(torch.float64)


def path_size(size: int, expected: int, where: str) -> None:
    """Raise `GuardError` where another number of rows was found than on the recorded path."""
    if size != expected:
        raise GuardError(refusal(where))


def _nothing(*args: object) -> None:
    del args


for schema, kernel in (
    ("path(Tensor value, float[] expected, str where) -> ()", path),
    ("path_size(SymInt size, SymInt expected, str where) -> ()", path_size),
):
    LIBRARY.define(schema)
    LIBRARY.impl(kernel.__name__, kernel, "CompositeExplicitAutograd")
    library.register_fake(f"matryoshkafy::{kernel.__name__}", _nothing, lib=LIBRARY)

PATH = torch.ops.matryoshkafy.path.default
PATH_SIZE = torch.ops.matryoshkafy.path_size.default
CHECKS: frozenset[object] = frozenset((PATH, PATH_SIZE))
for target in (PATH, PATH_SIZE):
    has_side_effect(cast("Callable[..., Any]", target))


def checks_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the checks of a recorded path, whatever reads what they check."""
    return [node for node in graph.nodes if node.target in CHECKS]


def note_read(func: object, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Put into the graph that is recorded what tensors hold whose values are about to be read.

    Args:
        func: one of `READERS`.
        args: what it is called with.
        kwargs: what it is called with by name.

    Raises:
        TraceError: they are more than a graph holds.
    """
    for value in _read_by(func, args, kwargs):
        if value.numel() > MOST:
            raise TraceError(
                f"the forward reads {value.numel()} values of a tensor in Python, which would be "
                f"constants of the graph; at most {MOST} are kept. Compute with torch operations, "
                "or give what is made of them as an input."
            )
        with disable_proxy_modes_tracing():
            held = held_in(value)
        PATH(value.detach(), held, _line())


def _read_by(
    func: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[Tensor]:
    """Yield the tensors that a function reads; what a tensor is made of, where that is a list."""
    made = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
    read = pytree.tree_leaves(made) if func in MAKERS else (*args, *kwargs.values())
    yield from (v for v in read if isinstance(v, Tensor))


def held_in(value: Any) -> list[float]:
    """Return the numbers of a tensor, complex ones as pairs."""
    return cast("list[float]", _numbers(value).tolist())  # pyright: ignore[reportUnknownMemberType]


def _line() -> str:
    frame = user_frame()
    if frame is None or frame.f_code.co_filename.startswith(LIBRARY_FOLDER):
        return ""  # the user's code has no file
    return line_of(frame.f_code, frame.f_lineno)
