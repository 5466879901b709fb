"""Replayed: optimizer steps recorded once as CUDA graphs.

A nested step launches the kernels of every size, and those of a small one are over before the next
is launched; a replayed step launches once. A graph holds the shapes that it was recorded with, so
each has its own, and nothing in a step may ask the device for a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from matryoshkafy.errors import MatryoshkafyError

WARM = 2  # steps of each shape before it is recorded: libraries allocate at their first calls
MOST = 128  # recordings; what has other shapes is computed as usual


class ReplayError(MatryoshkafyError):
    """A step that cannot be recorded."""


@dataclass(frozen=True)
class Recording:
    """A graph, the tensors that it reads, and those that it leaves."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    found: Tensor

    def replay(self, given: Sequence[Tensor]) -> Tensor:
        """Do the step on other tensors of the same shapes."""
        for mine, theirs in zip(self.given, given, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.graph.replay()
        return self.found.clone()


class Replayed:
    """`losses = Replayed(backward, optimizer, clip)(*batch)`: one step of the optimizer.

    On a CPU, and for the first steps of a shape, the step is computed as usual.

    Args:
        backward: (*batch) -> the losses, a tensor without gradient; it has called backward. What a
            batch holds beside tensors is a part of what was recorded.
        optimizer: made with capturable=True where steps are recorded; its rates become tensors,
            which `set_rates` changes.
        clip: largest norm of the gradient.
        records: False computes every step as usual.
    """

    def __init__(
        self,
        backward: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        clip: float,
        *,
        records: bool = True,
    ) -> None:
        self.backward, self.optimizer, self.clip = backward, optimizer, clip
        self.trained: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
        self.records = records and self.trained[0].is_cuda
        self.seen: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, Recording] = {}
        self.pool: Any = torch.cuda.graph_pool_handle() if self.records else None
        self.hold_rates()

    def hold_rates(self) -> None:
        """Keep the rates where the recordings read them; again after a state was loaded."""
        for group in self.optimizer.param_groups if self.records else ():
            group["lr"] = torch.as_tensor(float(group["lr"]), device=self.trained[0].device)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Give each group of parameters its learning rate."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, *batch: Any) -> Tensor:
        """Do one step on a batch of any structure."""
        if not self.records:
            return self._step(batch)
        leaves, spec = pytree.tree_flatten(batch)
        tensors = _tensors(leaves)
        shapes = [(t.shape, t.dtype) for t in tensors]
        key = (spec, *shapes, *(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
        if key in self.recordings:
            return self.recordings[key].replay(tensors)
        self.seen[key] += 1
        if self.seen[key] <= WARM or len(self.recordings) >= MOST:
            return self._aside(batch)
        self.recordings[key] = self._recorded(pytree.tree_map_only(Tensor, Tensor.clone, batch))
        return self.recordings[key].replay(tensors)

    def _step(self, batch: Sequence[Any]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        found = self.backward(*batch)
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        advance = cast("Callable[[], object]", self.optimizer.step)  # pyright: ignore[reportUnknownMemberType]
        advance()
        return found

    def _aside(self, batch: Sequence[Any]) -> Tensor:
        """A step on another stream, as what is recorded runs later."""
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            found = self._step(batch)
        here.wait_stream(side)
        return found

    def _recorded(self, batch: Sequence[Any]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                found = self._step(batch)
        except RuntimeError as error:
            raise ReplayError(
                f"this step cannot be recorded as a CUDA graph: {error}. Nothing in it may ask the "
                "device for a value or copy one from the host; compute the steps as usual "
                "(records=False, Recipe(replay=False))"
            ) from error
        return Recording(graph, _tensors(pytree.tree_leaves(batch)), found)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
