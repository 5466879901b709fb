"""Taught: a doll and what it learns as one module, whose call DDP, FSDP2 and accelerate hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matryoshkafy.dolls.batches import arguments_of
from matryoshkafy.dolls.doll import Doll, tables_of
from matryoshkafy.losses.distillation import KINDS
from matryoshkafy.training.live_corrections import LiveCorrections
from matryoshkafy.training.recipes import PROJECTED, DistilError, Term
from matryoshkafy.units.permute import users_order

PROJECTIONS, CORRECTIONS = "matryoshka_projections", "matryoshka_corrections"
_norm = cast("Callable[[Tensor], Tensor]", Tensor.norm)  # pyright: ignore[reportUnknownMemberType]


class Taught(nn.Module):
    """`losses = Taught(doll, terms)(sizes, batch, lessons)`: what these sizes have yet to learn.

    It holds the doll's own parameters under the user's own names, the projections and the
    corrections under names of ours. `foreign`: the teacher's units stand in the user's order, not
    the doll's.
    """

    terms: tuple[Term, ...]
    foreign: bool
    corrections: LiveCorrections | None

    def __init__(
        self,
        doll: Doll,
        terms: Sequence[Term],
        *,
        foreign: bool,
        corrections: LiveCorrections | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(tables_of(doll))
        self.__dict__.update(doll=doll, terms=tuple(terms), foreign=foreign)
        self.__dict__.update(corrections=corrections)
        self._hold(nn.ModuleDict())
        self.training = doll.training

    @property
    def projections(self) -> nn.ModuleDict:
        """{term_size: linear} from the widths of the sizes to the teacher's."""
        found = self._modules[PROJECTIONS]
        assert isinstance(found, nn.ModuleDict)
        return found

    def _hold(self, made: nn.ModuleDict) -> None:
        # Past nn.Module's __setattr__: the doll's own table is not to hold them.
        ours: dict[str, nn.Module] = {PROJECTIONS: made}
        if self.corrections is not None:
            ours[CORRECTIONS] = self.corrections
        self.__dict__["_modules"] = {**self.__dict__["doll"]._modules, **ours}

    def forward(self, sizes: Sequence[int], batch: object, lessons: Sequence[Tensor]) -> Tensor:
        """What each of the sizes has yet to learn [sizes]."""
        outputs = self._outputs(sizes, batch)
        found = [
            self.loss(m, self.said(m, out), batch, lessons)
            for m, out in zip(sizes, outputs, strict=True)
        ]
        # Wrappers want every parameter in every pass.
        own = () if self.corrections is None else self.corrections.parameters()
        ours = [*self.projections.parameters(), *own]
        return torch.stack(found) + sum(0.0 * p.sum() for p in ours)

    def _outputs(self, sizes: Sequence[int], batch: object) -> list[object]:
        """Return the output of each size, with its own corrections where there are some."""
        args, kwargs = arguments_of(batch)
        doll = self.__dict__["doll"]
        if self.corrections is None:
            outputs = doll.outputs(*args, **kwargs)
            return [outputs[m] for m in sizes]
        found: list[object] = []
        for size in sizes:
            with self.corrections.applied(size):
                found.append(doll.outputs(*args, **kwargs)[size])
        return found

    def loss(self, size: int, output: object, batch: object, lessons: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the terms of one size, mean over the rows."""
        values: list[Tensor] = []
        for number, (term, lesson) in enumerate(zip(self.terms, lessons, strict=True)):
            found = term.of(output, batch)
            key = f"{number}_{size}"
            if key in self.projections:
                found = self.projections[key](found)
            values.append(term.weight * _divergence(term, found, lesson))
        return torch.stack(values).sum()

    def said(self, size: int, output: object) -> object:
        """Return what a size says, the largest in the order of units that the teacher has."""
        doll = self.__dict__["doll"]
        return users_order(doll, output) if self.foreign and size == max(doll.sizes) else output

    def project(self, batch: object, lessons: Sequence[Tensor]) -> None:
        """Make a projection for each size and term whose width differs from the teacher's.

        Raises:
            DistilError: a term compares what has no rows in common.
        """
        args, kwargs = arguments_of(batch)
        doll, made = self.__dict__["doll"], nn.ModuleDict()
        with torch.no_grad():
            outputs = doll.outputs(*args, **kwargs)
            units = self._units(outputs[max(doll.sizes)], batch)
        for size, (number, term) in product(doll.sizes, enumerate(self.terms)):
            have, want = term.of(outputs[size], batch), lessons[number]
            _check_rows(size, term, have, want)
            if term.kind in PROJECTED and size == max(doll.sizes):
                _check_basis(term, term.of(self.said(size, outputs[size]), batch), want)
            if term.kind in PROJECTED and have.shape[-1] != want.shape[-1]:
                made[f"{number}_{size}"] = _prefix_projection(have, units[number], want)
        self._hold(made)

    def _units(self, output: object, batch: object) -> dict[int, Tensor]:
        """For each term with a projection the doll's unit [width] at each place of the teacher's.

        Places are counted in the full output, which is put back into the teacher's order.
        """
        counted = pytree.tree_map_only(Tensor, _places, output)
        back = self.said(max(self.__dict__["doll"].sizes), counted)
        picked = {
            number: term.of(back, batch)
            for number, term in enumerate(self.terms)
            if term.kind in PROJECTED
        }
        return {number: x.reshape(-1, x.shape[-1])[0] for number, x in picked.items()}


def _divergence(term: Term, found: Tensor, lesson: Tensor) -> Tensor:
    kind = KINDS[term.kind]
    found, lesson = (x.float().reshape(-1, x.shape[-1]) for x in (found, lesson))
    said = kind.lesson(lesson, term.temperature)
    return kind.divergence(found, said, term.temperature).mean()


def _check_rows(size: int, term: Term, have: Tensor, want: Tensor) -> None:
    narrow = term.kind == "kl" and have.shape != want.shape
    if have.shape[:-1] != want.shape[:-1] or narrow:
        raise DistilError(
            f"term {term.kind!r} compares {tuple(have.shape)} at size {size} with the teacher's "
            f"{tuple(want.shape)}; expected the same rows"
            + (" and as many logits" if narrow else "")
            + ": pick the parts that belong together with Term(of=..., of_teacher=...)"
        )


def _check_basis(term: Term, have: Tensor, want: Tensor) -> None:
    """Refuse a doll whose output was turned: unit by unit it is compared with another."""
    if have.shape != want.shape:
        return
    a, b = (x.detach().float().reshape(-1, x.shape[-1]) for x in (have, want))
    if float(_norm(a - b)) > 0.3 * float(_norm(b)):
        one, other = a @ a.t(), b @ b.t()
        if float(_norm(one - other)) < 0.1 * float(_norm(other)):
            raise DistilError(
                f"term {term.kind!r} compares the largest size with the teacher unit by unit, but "
                "its output stands in another basis (rotate turned it): rows agree with each "
                'other, units do not. Use Term("similarity"), or give the teacher\'s outputs '
                "turned alike: report.turn(doll, outputs)"
            )


def _places(value: Tensor) -> Tensor:
    """Return a tensor like this that holds the place in the last dim."""
    return torch.arange(value.shape[-1], device=value.device).expand_as(value).double()


def _prefix_projection(have: Tensor, units: Tensor, want: Tensor) -> nn.Linear:
    """A linear that starts as: each unit is the teacher's that it was made from."""
    narrow, wide = have.shape[-1], want.shape[-1]
    made = nn.Linear(narrow, wide, bias=False).to(have.device)
    known = units if len(units) == wide else torch.arange(wide)
    with torch.no_grad():
        made.weight.copy_(known.to(have.device)[:, None] == torch.arange(narrow).to(have.device))
    return made
