"""One number per norm and size: what a norm over a prefix makes too large, made right.

A norm over the first m of n units divides by their own spread, where the full model divides by the
spread of all n. Behind it the units are too large by 1 / s, with s the spread that the first m
units of the full norm's output have: sqrt(n / m times the share of the energy in them). Times s the
gain is right, and a slice that holds it is still a plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from matryoshkafy.axes import dims
from matryoshkafy.dolls.batches import flat_inputs
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import state_of
from matryoshkafy.graph.nodes import bound_args, op_key
from matryoshkafy.plan.plan import Many
from matryoshkafy.units.permute import OrderError

NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class NormScales:
    """Factors of the gains: {gain: one for each of `sizes`, the last 1.0}."""

    sizes: tuple[int, ...]
    factors: Mapping[str, tuple[float, ...]]

    def fold(self, small: nn.Module, size: int) -> nn.Module:
        """Multiply the gains of a slice of this size, in place; return it."""
        state = state_of(small)
        with torch.no_grad():
            for name, factor in self.at(size).items():
                state[name].mul_(factor)
        return small

    @contextmanager
    def applied(self, doll: Doll, size: int) -> Iterator[Doll]:
        """The doll with the gains of a size, while the context lasts; read no other size there."""
        state = doll._trace.state()
        kept = {name: state[name].detach().clone() for name in self.factors}
        with torch.no_grad():
            for name, factor in self.at(size).items():
                state[name].mul_(factor)
        try:
            yield doll
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    state[name].copy_(tensor)

    def at(self, size: int) -> dict[str, float]:
        """Return {gain: factor} of a size."""
        if size not in self.sizes:
            raise OrderError(
                f"size {size} was given; expected one of {', '.join(map(str, self.sizes))}"
            )
        level = self.sizes.index(size)
        return {name: each[level] for name, each in self.factors.items()}


def norm_scales(doll: Doll, batches: Iterable[Any]) -> NormScales:
    """Measure one factor for each norm and size of a sliced doll, on calibration inputs.

    Order or rotate first: the factors belong to the units as they stand.

    Args:
        doll: a doll in sliced nesting; nothing of it is changed.
        batches: calibration inputs, as for `order`.

    Returns:
        The factors; `fold` puts them into a slice.

    Raises:
        OrderError: a masked doll, whose norms see the whole width; no batch.
    """
    if doll.plan.masked:
        raise OrderError(
            'a masked doll was given, whose full model changes; convert with nesting="sliced"'
        )
    meter = _Spread(doll)
    training = doll.training
    doll.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                meter.run(*flat_inputs(doll, batch), enable_io_processing=False)
    finally:
        doll.train(training)
    if not meter.runs:
        raise OrderError("no batch was given; give a few hundred rows of inputs as the model's own")
    found = {name: tuple((s / rows).sqrt().tolist()) for name, (s, rows) in meter.spreads.items()}
    return NormScales(doll.plan.sizes, found)


class _Spread(fx.Interpreter):
    """Adds up, for each gain, the variance of the first units of what it multiplies."""

    def __init__(self, doll: Doll) -> None:
        super().__init__(doll.__dict__["_root"], graph=doll._trace.graph)
        self.plan = doll.plan
        self.spreads: dict[str, tuple[Tensor, int]] = {}
        self.mask: Tensor | None = None
        self.runs = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.runs, self.mask = self.runs + 1, None
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder" and n.target == "attention_mask":
            self.mask = value
        for gain, dim in _gains(n, self.plan):
            args = bound_args(n)
            given = self.env[args["input"]]
            bare = F.layer_norm if op_key(n) == "layer_norm" else F.rms_norm
            normed = bare(given.float(), args["normalized_shape"], eps=args.get("eps") or 1e-6)
            widths = [dims.size_at(dim, w) for w in self.plan.ladder]
            self._add(gain, self._real(normed), widths, centred=op_key(n) == "layer_norm")
        return value

    def _real(self, normed: Tensor) -> Tensor:
        """Return the rows of real tokens."""
        mask = self.mask
        known = mask is not None and mask.dim() == 2 and mask.shape == normed.shape[:2]
        return normed[mask.bool()] if known and mask is not None else normed.flatten(0, -2)

    def _add(self, gain: str, rows: Tensor, widths: list[int], *, centred: bool) -> None:
        each = [rows[:, :w].square().mean(1) for w in widths]
        if centred:
            each = [e - rows[:, :w].mean(1).square() for e, w in zip(each, widths, strict=True)]
        total = torch.stack([one.double().sum() for one in each])
        known, count = self.spreads.get(gain, (torch.zeros(len(widths)).double(), 0))
        self.spreads[gain] = known + total, count + len(rows)


def _gains(node: fx.Node, plan: Any) -> Iterator[tuple[str, dims.Dim]]:
    """The gain of a norm over one nested axis, with the axis."""
    if node.op != "call_function" or op_key(node) not in NORMS:
        return
    args, shape = bound_args(node), plan.nodes.get(node.name, ())
    gain = args.get("weight")
    plain = (
        isinstance(gain, fx.Node) and gain.op == "get_attr" and len(args["normalized_shape"]) == 1
    )
    if plain and shape and not isinstance(shape, Many) and dims.is_nested(shape[-1]):
        yield str(gain.target), shape[-1]
