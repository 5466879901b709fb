"""Corrections: what each size of a doll adds to the weights that all sizes share.

One prefix serves every larger size, too, and so it is a compromise. A few numbers of a size's own
lift it: a difference for each vector (as switchable norms have it, Yu et al. 2019), and one of low
rank for each matrix (LoRA, Hu et al. 2022). They are added before a slice is cut, which stays a
plain model; the largest size has none, it is the doll itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from matryoshkafy.axes import dims
from matryoshkafy.axes.dims import Dim, Widths
from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.dolls.slice import slice as cut
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import whole_file
from matryoshkafy.files.tensors import TensorFile, entry_of, write_tensors
from matryoshkafy.training.recipes import DistilError
from matryoshkafy.units.norm_scales import NormScales

# (difference [m],) of a vector; (left [m, rank], right [rank, n]) of a matrix
Own = tuple[Tensor, ...]
PARTS, SIZES = ("left", "right"), "sizes"


@dataclass(frozen=True)
class Corrections:
    """{size: {parameter: what the size adds to it}}, each as wide as the size is.

    Attributes:
        sizes: of the doll, ascending; the last one has no corrections.
        own: (difference,) of a vector, and (left, right) of a matrix, which adds left @ right.
    """

    sizes: tuple[int, ...]
    own: Mapping[int, Mapping[str, Own]]

    @classmethod
    def start(cls, doll: Doll, rank: int = 8, scales: NormScales | None = None) -> Corrections:
        """Return corrections that change nothing yet, for `distil(corrections=)` to learn.

        Args:
            doll: in sliced nesting; order or rotate it first, corrections belong to its units.
            rank: of what is added to a matrix; 0: vectors alone.
            scales: `norm_scales` of the doll, to begin with its factors in the gains.

        Raises:
            DistilError: a masked doll, whose full model changes; scales of other sizes.
        """
        if doll.plan.masked or (scales is not None and list(scales.sizes) != doll.sizes):
            raise DistilError(
                f"corrections were asked for of a {doll.plan.options.nesting} doll of {doll.sizes}"
                + ("" if scales is None else f", with scales of {list(scales.sizes)}")
                + "; expected sliced nesting, and norm_scales(doll, batches) of this doll"
            )
        shared, generator = _corrected(doll, rank), torch.Generator().manual_seed(5)
        own: dict[int, dict[str, Own]] = {}
        for size, widths in zip(doll.sizes[:-1], doll.plan.ladder, strict=False):
            found = {
                name: _none(tensor, _extent(doll.plan.parameters[name], widths), rank, generator)
                for name, tensor in shared.items()
            }
            own[size] = found | _scaled(doll, found, {} if scales is None else scales.at(size))
        return cls(tuple(doll.sizes), own)

    def at(self, size: int) -> Mapping[str, Own]:
        """Return what a size has of its own; the largest has nothing."""
        if size not in self.sizes:
            raise DistilError(
                f"size {size} was given; expected one of {', '.join(map(str, self.sizes))}"
            )
        return self.own.get(size, {})

    def check(self, doll: Doll) -> None:
        """Raises DistilError where these are not of this doll: of other sizes, names or widths."""
        wrong = "" if list(self.sizes) == doll.sizes and not doll.plan.masked else "another ladder"
        for size, widths in zip(doll.sizes[:-1], doll.plan.ladder, strict=False):
            for name, own in self.at(size).items() if not wrong else ():
                shape = doll.plan.parameters.get(name)
                if shape is None or _shape(own) != _extent(shape, widths):
                    wrong = f"{name} of another shape at size {size}"
        if wrong:
            raise DistilError(
                f"corrections of the sizes {list(self.sizes)} were given for a "
                f"{doll.plan.options.nesting} doll of {doll.sizes}, with {wrong}; expected those "
                "that Corrections.start(doll) of this doll in sliced nesting began"
            )

    def numbers(self, size: int) -> int:
        """Return how many numbers a size has of its own."""
        return sum(t.numel() for own in self.at(size).values() for t in own)

    @contextmanager
    def applied(self, doll: Doll, size: int) -> Generator[Doll, None, None]:
        """The doll with a size's weights, while the context lasts; read no other size there."""
        self.check(doll)
        state, own = trace_of(doll).state(), self.at(size)
        kept = {name: state[name].detach().clone() for name in own}
        with torch.no_grad():
            for name, each in own.items():
                state[name].add_(added(each, state[name]))
        try:
            yield doll
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    state[name].copy_(tensor)

    def slice(self, doll: Doll, size: int) -> fx.GraphModule:
        """Return the slice of a size with its corrections in its weights, a plain model."""
        with self.applied(doll, size):
            return cut(doll, size)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write them as one safetensors file, whole or not at all."""
        entries = [entry_of(SIZES, torch.tensor(self.sizes))]
        for size, each in self.own.items():
            for name, own in each.items():
                parts = zip(PARTS[: len(own)], own, strict=True)
                entries += [entry_of(f"{size}/{part}/{name}", tensor) for part, tensor in parts]
        with whole_file(file) as fresh:
            write_tensors(fresh, entries)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Corrections:
        """Read what `save` wrote.

        Raises:
            DistilError: no such file, or not one of `save`.
        """
        try:
            with TensorFile(file) as opened:
                found = {name: opened.read(name) for name in opened.names}
            sizes = [int(size) for size in found.pop(SIZES)]
            own: dict[int, dict[str, Own]] = {size: {} for size in sizes[:-1]}
            for key in sorted(found):  # the first part of a matrix comes before the second
                size, part, name = key.split("/", 2)
                before = own[int(size)].get(name, ())
                own[int(size)][name] = _grown(before, part, found[key])
        except (MatryoshkafyError, KeyError, ValueError, TypeError) as error:
            raise DistilError(
                f"{file} holds no corrections: {error}. Give a file that Corrections.save wrote"
            ) from error
        return cls(tuple(sizes), own)


def _shape(own: Own) -> list[int]:
    """Return the shape of what is added; of parts that do not fit together, none."""
    if len(own) == 1:
        return list(own[0].shape) if own[0].dim() == 1 else []
    left, right = own
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
    return [left.shape[0], right.shape[1]] if fits else []


def _grown(own: Own, part: str, tensor: Tensor) -> Own:
    """Return a correction with its next part."""
    if PARTS.index(part) != len(own):
        raise ValueError(f"{part} is not the part that comes next")
    return (*own, tensor)


def added(own: Own, like: Tensor) -> Tensor:
    """Return what is added to a tensor at full width; zero beyond the size."""
    small = own[0] if len(own) == 1 else own[0] @ own[1]
    missing = [n - m for n, m in zip(like.shape, small.shape, strict=True)]
    pads = [pad for n in reversed(missing) for pad in (0, n)]
    return F.pad(small, pads).to(like)


def _corrected(doll: Doll, rank: int) -> dict[str, Tensor]:
    """Return the trained vectors that nest, and the matrices that nest on both sides."""
    found: dict[str, Tensor] = {}
    known = set[int]()
    for name, tensor in trace_of(doll).state().items():
        shape = doll.plan.parameters.get(name, ())
        nests = bool(shape) and all(map(dims.is_nested, shape))
        wanted = len(shape) == 1 or (len(shape) == 2 and rank > 0)
        learns = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        if nests and wanted and learns and tensor.is_floating_point() and id(tensor) not in known:
            known.add(id(tensor))
            found[name] = tensor
    return found


def _extent(shape: tuple[Dim, ...], widths: Widths) -> list[int]:
    """Return where the last unit that a size keeps ends, along each dim."""
    return [dims.kept(dim, widths)[-1][1] for dim in shape]


def _none(tensor: Tensor, extent: list[int], rank: int, generator: torch.Generator) -> Own:
    """Return a correction of nothing. Of a matrix one factor is drawn, so that the other learns."""
    if len(extent) == 1:
        return (tensor.new_zeros(extent),)
    out, into = extent
    drawn = torch.randn(rank, tensor.shape[1], generator=generator) / tensor.shape[1] ** 0.5
    return tensor.new_zeros(out, rank), drawn[:, :into].to(tensor)


def _scaled(doll: Doll, own: Mapping[str, Own], factors: Mapping[str, float]) -> dict[str, Own]:
    """Return what makes gains their multiples."""
    state = trace_of(doll).state()
    found: dict[str, Own] = {}
    for name, factor in factors.items():
        if name in own:
            gain = state[name].detach()[: len(own[name][0])]
            found[name] = (gain * (factor - 1),)
    return found
