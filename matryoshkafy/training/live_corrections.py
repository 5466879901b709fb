"""LiveCorrections: the corrections of a doll's sizes while they are learnt beside it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll, root_of, trace_of
from matryoshkafy.training.corrections import Corrections, Own, added
from matryoshkafy.training.recipes import DistilError
from matryoshkafy.training.sharding import whole

Table = dict[str, Any]  # the parameters of a module, or what stands for them


class LiveCorrections(nn.Module):
    """`with live.applied(size):` the doll's weights are those of a size, and both parts learn."""

    def __init__(self, doll: Doll, start: Corrections) -> None:
        super().__init__()
        start.check(doll)
        if doll.recomputes:
            raise DistilError(
                "corrections were given for a doll that computes parts of itself again in the "
                "backward, when the weights are the doll's own; leave out checkpoint_gradients, "
                "or the corrections"
            )
        self.sizes = start.sizes
        tensors: list[Tensor] = []
        self.indices: dict[int, dict[str, list[int]]] = {size: {} for size in start.sizes}
        for size, each in start.own.items():
            for name, own in each.items():
                self.indices[size][name] = list(range(len(tensors), len(tensors) + len(own)))
                tensors += own
        self.tensors = nn.ParameterList(t.detach().clone().to(doll.device) for t in tensors)
        state = trace_of(doll).state()
        # A tensor that is tied is replaced wherever it is read.
        self.ties = {
            name: [other for other, tensor in state.items() if tensor is state[name]]
            for name in {name for own in start.own.values() for name in own}
        }
        self.__dict__["root"] = root_of(doll)  # not a part of ours

    def at(self, size: int) -> dict[str, Own]:
        """Return what a size has of its own, as parameters."""
        return {
            name: tuple(self.tensors[i] for i in indices)
            for name, indices in self.indices[size].items()
        }

    @contextmanager
    def applied(self, size: int) -> Generator[None, None, None]:
        """The weights of a size, while the context lasts; read no other size in it."""
        kept: list[tuple[Table, str, nn.Parameter]] = []
        try:
            for name, own in self.at(size).items():
                places = [self._place(tied) for tied in self.ties[name]]
                table, leaf = places[0]
                kept += [(table, leaf, table[leaf]) for table, leaf in places]
                corrected = table[leaf] + added(own, table[leaf])
                for table, leaf in places:
                    table[leaf] = corrected
            yield
        finally:
            for table, leaf, shared in kept:
                table[leaf] = shared

    def _place(self, name: str) -> tuple[Table, str]:
        path, _, leaf = name.rpartition(".")
        return self.__dict__["root"].get_submodule(path)._parameters, leaf

    def found(self) -> Corrections:
        """Return the corrections as they are now; sharded ones are gathered, by every process."""
        own = {
            size: {name: _values(each) for name, each in self.at(size).items()}
            for size in self.sizes[:-1]
        }
        return Corrections(self.sizes, own)


def _values(own: Own) -> tuple[Tensor, ...]:
    return tuple(whole(t.detach()).clone() for t in own)
