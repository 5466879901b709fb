"""Session: an answer at a small size, extended to a larger one for the price of the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.rewrite.codegen import runnable
from matryoshkafy.serving.escalation import Step, Writer, answer, grow
from matryoshkafy.serving.vectors import ServingError


class Session:
    """Answers of one masked doll on one input after another, each extended as far as needed.

    A masked doll's small size computes a prefix of what its large size computes. `answer` computes
    a size; `extend` goes on from there to a larger one and computes the new columns alone: new
    rows of weights, new heads, norms over new units. Results are those of one pass at that size.

    Args:
        doll: a doll in masked nesting, scope "full". It is used in evaluation mode, without
            gradients.

    Raises:
        ServingError: for another nesting or scope, or an op whose new units cannot be computed
            alone; it names the op and the line.

    Example:
        session = Session(doll)
        rough = session.answer(tokens, size=64)
        if unsure(rough):
            better = session.extend(256)
    """

    def __init__(self, doll: Doll) -> None:
        trace, plan = parts_of(doll)
        if not plan.masked or plan.options.scope != "full":
            raise ServingError(
                f"a doll in {plan.options.nesting} nesting with scope {plan.options.scope!r} was "
                'given; only nesting="masked" with scope="full" makes a small size a prefix of a '
                "larger one. Slice it, and call each size"
            )
        self._doll, self._trace, self._plan = doll, trace, plan
        self._answers = [
            self._module(answer(Writer(trace, plan, (i, i)))) for i in range(plan.levels)
        ]
        self._steps = [self._module(step) for step in self._grown()]
        self._inputs: list[Any] = []
        self._cache: dict[str, Tensor] = {}
        self._level = -1

    @property
    def size(self) -> int | None:
        """The size of the last answer; None before the first."""
        return None if self._level < 0 else self._plan.sizes[self._level]

    def answer(self, *args: object, size: int, **kwargs: object) -> Any:
        """Return the model's outputs at a size, in the user's structure.

        Args:
            args: the user's arguments; what was cached of earlier inputs is dropped.
            size: a rung of the ladder.
            kwargs: the user's keyword arguments.
        """
        level = self._plan.level(size)
        self._inputs = self._trace.signature.flatten(args, kwargs)
        self._cache, self._level = {}, -1
        return self._climb(level)

    def extend(self, size: int) -> Any:
        """Return the outputs of the last inputs at a larger size (or again at the same one).

        Raises:
            ServingError: before the first answer, or for a smaller size.
        """
        level = self._plan.level(size)
        if self._level < 0:
            raise ServingError("extend was called before answer: there is nothing to extend")
        if level < self._level:
            raise ServingError(
                f"extend({size}) was called at size {self.size}; an answer only grows. Call "
                f"answer(..., size={size})"
            )
        return self._climb(level)

    def cached_bytes(self) -> int:
        """Return how many bytes the values take that a larger size will read."""
        return sum(t.numel() * t.element_size() for t in self._cache.values())

    @torch.no_grad()
    def _climb(self, level: int) -> Any:
        training = self._doll.training
        self._doll.eval()
        try:
            while self._level < level:
                self._level += 1
                self._grow(*self._steps[self._level])
            step, module = self._answers[level]
            flat = module(*self._inputs, *(self._cache[name] for name in step.reads))
        finally:
            self._doll.train(training)
        return self._trace.signature.unflatten(flat)

    def _grow(self, step: Step, module: fx.GraphModule) -> None:
        values = module(*self._inputs, *(self._cache[name] for name in step.reads))
        self._cache |= dict(zip(step.returns, values, strict=True))

    def _module(self, step: Step) -> tuple[Step, fx.GraphModule]:
        return step, runnable(self._trace.root, step.graph)

    def _grown(self) -> list[Step]:
        """Return the steps; each gives what the answers and all later steps read."""
        reads = {name for step, _ in self._answers for name in step.reads}
        return grown(
            lambda i: Writer(self._trace, self._plan, (i - 1, i)), self._plan.levels, reads
        )


def grown(writer_of: Callable[[int], Writer], levels: int, reads: Iterable[str]) -> list[Step]:
    """Return a step for each level that gives what is read of it, and what later steps read."""
    wanted = set(reads)
    while True:
        steps = [grow(writer_of(level), wanted) for level in range(levels)]
        more = {name for step in steps for name in step.reads} - wanted
        if not more:
            return steps
        wanted |= more
