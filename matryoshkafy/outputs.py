"""{size: output}, computed late, and the last linear of a model as one readout for all sizes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from matryoshkafy.errors import MatryoshkafyError

# What selects positions of an output.
Place = Tensor | slice | int
DEVICES = ("cpu", "cuda", "xpu", "mps")


class OutputsError(MatryoshkafyError):
    """An output is read when what it is computed from has changed, or at no positions of it."""


class Late:
    """A value that is computed when it is first read, and again if that failed."""

    def __init__(self, compute: Callable[[], object]) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = None

    @property
    def pending(self) -> bool:
        """Whether it is still to be computed."""
        return self._compute is not None

    @property
    def value(self) -> Any:
        """What `compute` returns."""
        if self._compute is not None:
            self._value = self._compute()
            self._compute = None
        return self._value


def read(value: object) -> Any:
    """Return a value, late or not."""
    return value.value if isinstance(value, Late) else value


class Outputs(MutableMapping[int, Any]):
    """{size: output}, ascending, where an output may be computed when it is first read.

    What is computed late is computed in the mode of the call (gradients, autocast, training), and
    only while parameters and inputs are those of the call: after an optimizer's step it is refused,
    because an old trunk and a new head make no model. An error is raised at every read. A write
    through `.data` goes unseen, here as in autograd.

    Args:
        values: {size: output, or `Late`}.
        readouts: {size: `Readout`, or `Late`}, where the scores come from a last linear.
        moment: the call, which late values need; None where nothing is late.
    """

    def __init__(
        self,
        values: Mapping[int, object],
        readouts: Mapping[int, object] | None = None,
        moment: Moment | None = None,
    ) -> None:
        self._values, self._readouts = dict(values), dict(readouts or {})
        self._moment = moment

    @property
    def readout(self) -> Readout | None:
        """The one readout that serves every size (masked nesting), else None.

        Where it is one, a cross entropy over these outputs is fused over the sizes.
        """
        found = list(self._readouts.values())
        one = bool(found) and all(value is found[0] for value in found)
        return self.readout_at(next(iter(self._readouts))) if one else None

    def readout_at(self, size: int) -> Readout | None:
        """Return the last linear that a size's scores come from, None where its tail is none."""
        return self._read(self._readouts[size], size) if size in self._readouts else None

    def scores_at(self, *index: Place) -> Iterator[tuple[int, Tensor]]:
        """Yield (size, scores of chosen positions), ascending; the other scores are not computed.

        index selects positions as it would of the output: `scores_at(slice(None), -1)` the last of
        each row, `scores_at(rows, last)` one of each; choose among the scores afterwards. In masked
        nesting each size costs what it adds. An output that ends in no linear is computed whole and
        then indexed.
        """
        chosen = self.at(*index)
        readout = chosen.readout
        yield from chosen.items() if readout is None else readout.logits_by_size()

    def at(self, *index: Place) -> Outputs:
        """Return the scores of chosen positions, selected as in `scores_at`, as outputs.

        A cross entropy over them is fused as over the whole: `loss(outputs.at(rows, columns),
        targets[rows, columns])` where few positions of a batch learn.
        """
        readouts: dict[int, Late] = {}
        shared: dict[int, Late] = {}
        for size, value in self._readouts.items():
            own = Late(partial(self._chosen, size, index))
            readouts[size] = shared.setdefault(id(value), own)
        scores = {m: Late(partial(self._scores, m, index, readouts.get(m))) for m in self}
        return Outputs(scores, readouts, self._moment)

    def _chosen(self, size: int, index: tuple[Place, ...]) -> Readout | None:
        own = self.readout_at(size)
        return None if own is None else own.at(*index)

    def _scores(self, size: int, index: tuple[Place, ...], chosen: Late | None) -> Tensor:
        own: Readout | None = read(chosen)
        return cast(Tensor, scores_of(self[size]))[index] if own is None else own.logits(size)

    def _read(self, value: object, size: int) -> Any:
        if isinstance(value, Late) and value.pending and self._moment is not None:
            with self._moment.again(size):
                return value.value
        return read(value)

    def __getitem__(self, size: int) -> Any:
        if size not in self._values:
            raise KeyError(f"size {size} is not among the sizes {list(self._values)}")
        return self._read(self._values[size], size)

    def __setitem__(self, size: int, output: object) -> None:
        self._values[size] = output
        self._readouts.pop(size, None)

    def __delitem__(self, size: int) -> None:
        del self._values[size]
        self._readouts.pop(size, None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, size: object) -> bool:
        return size in self._values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        theirs = cast("Mapping[int, object]", other)
        same = list(self) == list(theirs)
        return same and all(_equal(out, theirs[m]) for m, out in self.items())

    __hash__ = None  # type: ignore[assignment]  as in every mutable mapping

    def __reduce__(self) -> Any:
        # What is late is computed now: the call that it belongs to does not travel.
        return Outputs, (dict(self.items()),)

    def __repr__(self) -> str:
        return f"Outputs({dict(self.items())!r})"


def _equal(one: object, other: object) -> bool:
    """Whether two outputs have the same structure and equal tensors."""
    (left, spec), (right, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
        for a, b in zip(left, right, strict=True)
    )


@dataclass(eq=False)
class Moment:
    """How things stood at a call: modes, and the version of each tensor that it read."""

    root: nn.Module
    training: bool
    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    watched: tuple[tuple[str, Tensor, Any], ...] = field(repr=False)
    changed: str = ""

    @staticmethod
    def of(root: nn.Module, inputs: object = ()) -> Moment:
        """Return this moment of a model and its inputs (any structure of tensors).

        Buffers are watched in evaluation mode alone: batch norm writes its own while it trains.
        """
        named = _named(root, root.training)
        leaves = pytree.tree_leaves(inputs)
        named |= {f"input {i}": v for i, v in enumerate(leaves) if isinstance(v, Tensor)}
        compiling = torch.compiler.is_compiling()
        watched = () if compiling else tuple((n, t, _stamp(t)) for n, t in named.items())
        moment = Moment(root, root.training, torch.is_grad_enabled(), _autocast(), watched)
        if not compiling:
            _LIVE.add(moment)
        return moment

    @contextlib.contextmanager
    def again(self, size: int) -> Generator[None, None, None]:
        """Compute as at the moment; raises `OutputsError` where a tensor has changed since."""
        changed = self.changed or self._changed()
        if changed:
            raise OutputsError(
                f"the output of size {size} was not read before {changed} changed, so it would mix "
                "two models; read every size that you need before optimizer.step(), or call "
                "outputs again"
            )
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.root, "training", self.root.training)
            self.root.training = self.training
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            yield

    def _changed(self) -> str:
        """Return the first tensor that was written to or replaced, "" if none was."""
        now = _named(self.root, self.training)
        return next(
            (n for n, t, old in self.watched if now.get(n, t) is not t or _stamp(t) != old), ""
        )


def _named(root: nn.Module, training: bool) -> dict[str, Tensor]:
    """Return what a model reads of its own; no buffers in training, where it writes them."""
    named: dict[str, Tensor] = {f"parameter {n!r}": p for n, p in root.named_parameters()}
    return named if training else named | {f"buffer {n!r}": b for n, b in root.named_buffers()}


def _autocast() -> tuple[tuple[str, bool, torch.dtype], ...]:
    return tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES)


def _stamp(tensor: Tensor) -> Any:
    """What differs once a tensor was written to, or its `.data` replaced."""
    version = None if tensor.is_inference() else tensor._version
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return version, tensor.data_ptr() if plain else None


# torch's fused optimizers write past the version counter, so their steps are heard of.
_LIVE: weakref.WeakSet[Moment] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    if not _LIVE:
        return
    groups = [group["params"] for group in optimizer.param_groups if group.get("fused")]
    written = {id(p) for params in groups for p in params}
    for moment in list(_LIVE) if written else ():
        names = [name for name, tensor, _ in moment.watched if id(tensor) in written]
        moment.changed = moment.changed or next(iter(names), "")


register_optimizer_step_post_hook(_after_step)


@dataclass(frozen=True)
class Readout:
    """The logits of size s are scale * hidden[..., :n] @ table[:, :n].T + bias, n = widths[s].

    Args:
        hidden: [..., D], the full-width trunk value that enters the last linear.
        table: [V, D], the weight of the last linear.
        bias: [V] or None.
        widths: {size: how many leading units of D it reads}.
        scale: a number, or a tensor of one element.
    """

    hidden: Tensor
    table: Tensor
    bias: Tensor | None
    widths: Mapping[int, int]
    scale: float | Tensor = 1.0

    @property
    def scaled(self) -> Tensor:
        """hidden * scale."""
        plain = not isinstance(self.scale, Tensor) and self.scale == 1
        return self.hidden if plain else self.hidden * self.scale

    def at(self, *index: Place) -> Readout:
        """The readout of chosen positions: of hidden[index].

        Raises OutputsError where the index chooses on the last axis, which here is that of units.
        """
        if reaches_last_axis(index, self.hidden.ndim):
            raise OutputsError(
                f"an index of {len(index)} parts chooses on the last axis of scores "
                f"{[*self.hidden.shape[:-1], len(self.table)]}; choose positions alone, and then "
                "among their scores: {size: scores[..., 1:] for size, scores in scores_at(...)}"
            )
        return replace(self, hidden=self.hidden[index])

    def logits(self, size: int) -> Tensor:
        """The logits [..., V] of a size, stored in full."""
        width = self.widths[size]
        return F.linear(self.scaled[..., :width], self.table[:, :width], self.bias)

    def logits_by_size(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (size, logits [..., V]) ascending: all sizes at the cost of one."""
        sizes = sorted(self.widths, key=lambda size: (self.widths[size], size))
        widths = [self.widths[size] for size in sizes]
        yield from zip(sizes, running(self.scaled, self.table, widths, self.bias), strict=True)


def reaches_last_axis(index: Sequence[object], axes: int) -> bool:
    """Whether an index chooses on the last of so many axes; to take all of it is no choice."""
    parts = [part for part in index if part is not None]
    open_end = not any(part is Ellipsis for part in parts) and sum(map(_axes_of, parts)) < axes
    if not parts or open_end or parts[-1] is Ellipsis:
        return False
    return not isinstance(parts[-1], slice) or parts[-1] != slice(None)


def _axes_of(part: object) -> int:
    """How many axes a part of an index takes; a mask as many as it has."""
    return part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def running(
    hidden: Tensor, table: Tensor, widths: Sequence[int], start: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield start + hidden[..., :n] @ table[..., :n]' for each n of ascending widths.

    Each is the one before plus the product of one block of units. hidden [N, ..., D]; table [V, D]
    of all rows, or [N, K, D] with rows of each row's own (then hidden is [N, D]).
    """
    total, done = start, 0
    for width in widths:
        if width > done or total is None:
            part, rows = hidden[..., done:width], table[..., done:width]
            total, done = _added(total, part, rows), width
        yield total


def _added(total: Tensor | None, part: Tensor, rows: Tensor) -> Tensor:
    """total + part @ rows', in one product where there are two matrices."""
    if total is not None and part.ndim == rows.ndim == 2:
        return torch.addmm(total, part, rows.t())
    step = part @ rows.t() if rows.ndim == 2 else (rows @ part[..., None]).squeeze(-1)
    return step if total is None else total + step


def scores_of(output: object) -> object:
    """Return the logits of a model's output: the output itself, its "logits", or its first part.

    The same for every nesting and criterion.

    Args:
        output: what a model returned; one that has neither is returned as it is.
    """
    if hasattr(output, "logits"):
        return getattr(output, "logits")  # noqa: B009  an attribute that not every output has
    if isinstance(output, Mapping):
        parts = cast("Mapping[object, object]", output)
        names = ["logits"] if "logits" in parts else list(parts)
        return parts[names[0]] if len(names) == 1 else parts
    listed = isinstance(output, (tuple, list))
    parts = cast("Sequence[object]", output) if listed else ()
    return parts[0] if parts else output
