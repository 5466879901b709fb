"""What autograd will do: the steps of a backward, and what in them a traced graph cannot hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

Step = torch.autograd.graph.Node


def steps(outputs: Iterable[Tensor]) -> set[Step]:
    """Return the steps that lead from outputs to their leaves."""
    queue: list[Step | None] = [v.grad_fn for v in outputs]
    seen: set[Step] = set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return seen


def functions(found: Iterable[Step]) -> list[str]:
    """Return the names of the autograd Functions of the user's own."""
    own = torch.autograd.function.BackwardCFunction
    names = [type(n).__name__ for n in found if isinstance(n, own)]
    return list(dict.fromkeys(name.removesuffix("Backward") for name in names))


def structure(
    found: Iterable[Step], leaves: dict[str, Tensor]
) -> Counter[tuple[str, tuple[str, ...]]]:
    """Return how often each op of the backward follows which others, leaves by name."""
    # Reversed: a tied tensor goes by its first name in graph and model.
    names = {id(t): name for name, t in reversed(leaves.items())}

    def word(node: Step | None) -> str:
        leaf = getattr(node, "variable", None)
        return names.get(id(leaf), "") if leaf is not None else node.name() if node else ""

    return Counter((word(n), tuple(word(parent) for parent, _ in n.next_functions)) for n in found)


def repacked(found: Iterable[Step]) -> bool:
    """Tell whether `saved_tensors_hooks` stand between a forward and its backward.

    A saved tensor takes one pair of hooks and cannot be asked for it: it is offered another, so
    the steps asked are then of no further use but to be run.
    """
    return any(_refuses_hooks(getattr(node, name)) for node in found for name in _saved(type(node)))


@cache
def _saved(kind: type[Step]) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _refuses_hooks(saved: Any) -> bool:
    try:
        for part in cast("tuple[Any, ...]", saved if isinstance(saved, tuple) else (saved,)):
            part.register_hooks(_same, _same)
    except RuntimeError as error:
        return "already been set" in str(error)  # else it holds nothing, or was freed
    return False


def _same(value: Tensor) -> Tensor:
    return value
