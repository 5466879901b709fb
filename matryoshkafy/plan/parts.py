"""The records that a plan is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from matryoshkafy.axes import dims as axes
from matryoshkafy.axes.dims import Dim
from matryoshkafy.plan.text import place_of


@dataclass(frozen=True)
class Group:
    """Axes that must shrink together.

    Args:
        name: where it was born.
        size: its units at full width.
        parameters: "name:dim" of the parameters' axes in it.
    """

    name: str
    size: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    """An axis that stays whole, and why.

    Args:
        axis: "name:dim" of a parameter.
        size: of the axis.
        why: input, vocabulary, classes, inner, indexed, unknown op, ...
        place: the user's line, module or tensor that asked for it.
    """

    axis: str
    size: int
    why: str
    place: str = ""


@dataclass(frozen=True)
class Unknown:
    """An op without a rule: its axes stay whole.

    Args:
        op: its name.
        node: where in the graph.
        source: the user's line.
    """

    op: str
    node: str
    source: str


@dataclass(frozen=True)
class Scalar:
    """A constant of the graph that was derived from a width.

    Args:
        node: the node that holds it.
        argument: its place among the arguments, or its name.
        value: at full width.
        group: whose width it follows, by its index in the plan.
        units: of that group at full width.
        power: of the formula.
        source: the user's line.
        form: "power": value = factor * units ** power + offset; "count": units are a factor of a
            count of values, x.numel(); "alibi": value = 2 ** (-8 / units), the base of the slopes
            of ALiBi (arXiv 2108.12409, section 3) for a power of two of heads.
        offset: of the power: -1 where an unbiased variance divides by units - 1.
    """

    node: str
    argument: str
    value: float
    group: int
    units: int
    power: float
    source: str = ""
    form: str = "power"
    offset: float = 0.0

    @property
    def name(self) -> str:
        """What `keep=["scalar:..."]` calls it: the user's line; the node where none is known."""
        return place_of(self.source) or self.node

    def at(self, width: int) -> float:
        """Return the constant where the group has `width` units."""
        if self.form == "power":
            scaled = (self.value - self.offset) * (width / self.units) ** self.power
            return scaled + self.offset
        if self.form == "count":
            return float(width)
        return 2.0 ** (-8.0 / width) if width & (width - 1) == 0 else self.value

    def __str__(self) -> str:
        formulas = {"power": self._formula(), "count": f"{self.units} of a count"}
        return f"{self.value:.6g} = {formulas.get(self.form, f'2 ** (-8 / {self.units})')}"

    def _formula(self) -> str:
        power = self.units**self.power
        factor = (self.value - self.offset) / power
        times = "" if math.isclose(factor, 1.0, rel_tol=1e-3) else f"{factor:.6g} * "
        added = f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else ""
        return f"{times}{self.units} ** {self.power:g}{added}"


@dataclass(frozen=True)
class Action:
    """What masked nesting does at a node.

    Args:
        kind: mask, norm, level, clamp, readout, ...
        groups: over which groups, by their index in the plan.
    """

    kind: str
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mask:
    """A weight is zero where the level of its dim `out` is below that of its dim `into`."""

    out: int
    into: int


Masks = tuple[Mask, ...]


@dataclass(frozen=True)
class Stored:
    """What a sub-model keeps under one name.

    `dims` are those of the tensor; `mask` says where its zeros are written out; `source` names the
    node whose value it is, taken at full width before it is cut ("": the model's own tensor);
    `scalar` is the formula of a buffer of one number that was derived from a width.
    """

    dims: tuple[Dim, ...]
    mask: Mask | None = None
    source: str = ""
    scalar: Scalar | None = None

    def to_json(self) -> dict[str, object]:
        """Return plain JSON values."""
        mask = {} if self.mask is None else {"mask": [self.mask.out, self.mask.into]}
        source = {"source": self.source} if self.source else {}
        scalar = {} if self.scalar is None else {"scalar": asdict(self.scalar)}
        return {"dims": [axes.to_json(d) for d in self.dims], **mask, **source, **scalar}

    @staticmethod
    def from_json(saved: Mapping[str, Any]) -> Stored:
        """Read what `to_json` wrote; anything else raises."""
        mask = Mask(*saved["mask"]) if "mask" in saved else None
        scalar = Scalar(**saved["scalar"]) if "scalar" in saved else None
        shape = tuple(map(axes.from_json, saved["dims"]))
        return Stored(shape, mask, saved.get("source", ""), scalar)


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        nesting: "masked" or "sliced".
        scope: "full", "ffn" or "output".
        norm: statistics of masked norms, "block" or "prefix".
        keep: patterns of names whose axes stay whole.
    """

    nesting: str = "masked"
    scope: str = "full"
    norm: str = "block"
    keep: tuple[str, ...] = ()
