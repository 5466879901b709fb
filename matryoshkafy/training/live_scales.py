"""LiveScales: the factors of a doll's norms, learnt beside it, one for each norm and size."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll, root_of
from matryoshkafy.training.recipes import DistilError
from matryoshkafy.units.norm_scales import NormScales


class LiveScales(nn.Module):
    """`with scales.applied(size):` the doll's gains are those of a size, and the factors learn.

    The largest size has no factors: it stays the doll itself.
    """

    def __init__(self, doll: Doll, start: NormScales) -> None:
        super().__init__()
        if doll.plan.masked or list(start.sizes) != doll.sizes:
            raise DistilError(
                f"scales of the sizes {list(start.sizes)} were given for a "
                f"{doll.plan.options.nesting} doll of {doll.sizes}; expected norm_scales(doll, "
                "batches) of this doll in sliced nesting"
            )
        if doll.recomputes:
            raise DistilError(
                "scales were given for a doll that computes parts of itself again in the backward, "
                "when the gains are the doll's own; leave out checkpoint_gradients, or the scales"
            )
        self.sizes, self.gains = start.sizes, tuple(start.factors)
        first = (torch.tensor(each[:-1], device=doll.device) for each in start.factors.values())
        self.factors = nn.ParameterList(first)
        self.__dict__["root"] = root_of(doll)  # not a part of ours

    @contextmanager
    def applied(self, size: int) -> Generator[None, None, None]:
        """The gains of a size, while the context lasts; read no other size in it."""
        level = self.sizes.index(size)
        kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for name, factors in zip(self.gains, self.factors, strict=True):
                if level < len(factors):
                    kept.append(self._replaced(name, factors[level]))
            yield
        finally:
            for module, leaf, gain in kept:
                module._parameters[leaf] = gain

    def _replaced(self, name: str, factor: Tensor) -> tuple[nn.Module, str, nn.Parameter | None]:
        path, _, leaf = name.rpartition(".")
        module = self.__dict__["root"].get_submodule(path)
        gain = module._parameters[leaf]
        module._parameters[leaf] = gain * factor.to(gain.dtype)
        return module, leaf, gain

    def found(self) -> NormScales:
        """Return the factors as they are now."""
        rows = ((*f.detach().tolist(), 1.0) for f in self.factors)
        return NormScales(self.sizes, dict(zip(self.gains, rows, strict=True)))
