"""What norms give before their gains, streamed over calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim
from matryoshkafy.dolls.batches import flat_inputs
from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.graph.nodes import bound_args
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rules import op_of

NORMS = ("layer_norm", "rms_norm")  # words of `Op.nested`
# (gain, its axis, rows [n, width] without gain and bias, whether the mean was removed)
Take = Callable[[str, Dim, Tensor, bool], None]


def stream(doll: Doll, batches: Iterable[object], take: Take) -> int:
    """Run the full model and hand on what each norm with a gain gives; return the batches.

    Padding is left out where a mask named `attention_mask` comes in.
    """
    meter, count, training = _Meter(doll, take), 0, doll.training
    doll.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                meter.run(*flat_inputs(doll, batch), enable_io_processing=False)
                count += 1
    finally:
        doll.train(training)
    return count


class _Meter(fx.Interpreter):
    """Runs the graph; at each norm over one nested axis it computes the bare norm."""

    def __init__(self, doll: Doll, take: Take) -> None:
        super().__init__(root_of(doll), graph=trace_of(doll).graph)
        self.plan, self.take = doll.plan, take
        self.mask: Tensor | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.mask = None
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder" and n.target == "attention_mask":
            self.mask = value
        for gain, dim in gains_of(n, self.plan):
            args, centred = bound_args(n), op_of(n).nested == "layer_norm"
            given = self.env[args["input"]]
            bare = F.layer_norm if centred else F.rms_norm
            normed = bare(given.float(), args["normalized_shape"], eps=args.get("eps") or 1e-6)
            self.take(gain, dim, real_rows(normed, self.mask), centred)
        return value


def real_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return [rows, n] of a value [..., n]: those of real tokens, where a mask of zeros and ones
    [samples, positions] fits.
    """
    fits = mask is not None and mask.dim() == 2 and not mask.is_floating_point()
    if fits and mask is not None and value.dim() > 2 and mask.shape == value.shape[:2]:
        value = value[mask.bool()]
    return value.flatten(0, -2)


def gains_of(node: fx.Node, plan: Plan) -> Iterator[tuple[str, Dim]]:
    """The gain of a norm over one nested axis, with the axis."""
    if op_of(node).nested not in NORMS:
        return
    args, shape = bound_args(node), plan.dims(node.name)
    gain = args.get("weight")
    if not isinstance(gain, fx.Node) or gain.op != "get_attr":
        return
    if len(args["normalized_shape"]) == 1 and shape and dims.is_nested(shape[-1]):
        yield str(gain.target), shape[-1]
