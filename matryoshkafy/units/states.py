"""What a walk knows of a value that carries a group, and what it found for the group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Stream:
    """A value in the group's basis; rotating the group rotates it."""


@dataclass(frozen=True)
class Written(Stream):
    """A stream that one product wrote, with the dim of its weight and its bias: a gain that nothing
    else reads before can be folded into them.
    """

    product: fx.Node
    weight: str
    dim: int
    bias: str = ""


@dataclass(frozen=True)
class Weight:
    """A parameter in the group's basis, or `offset` + one: a gain, where it multiplies a stream."""

    name: str
    offset: float = 0.0


@dataclass(frozen=True)
class Gained:
    """A stream whose units were multiplied by a gain: only weights may read it."""

    gain: str
    offset: float
    bias: str = ""


@dataclass(frozen=True)
class Squared:
    """The squares of a stream, to be summed over the axis."""


@dataclass(frozen=True)
class Uniform:
    """The same number at every unit."""


State = Stream | Weight | Gained | Squared | Uniform
Reader = tuple[str, int]


@dataclass
class Survey:
    """What the walk found for one group.

    `obstacles`: why it cannot be rotated. `gains`: those to be folded into `readers` {gain:
    {(weight, dim)}}, `written` those to be folded into what writes the stream {gain: (its offset,
    writers)}; `scales`: every gain, those of ones too, none of which is turned. `diagonal`
    those that stay on the stream, of a post-norm survey. `mean`: the direction of ones must stay.
    `contracted`: some weight reads it.
    """

    group: int
    obstacles: list[str] = field(default_factory=list[str])
    gains: dict[str, Gained] = field(default_factory=dict[str, Gained])
    readers: dict[str, set[Reader]] = field(default_factory=dict[str, set[Reader]])
    written: dict[str, tuple[float, set[Written]]] = field(default_factory=dict[str, Any])
    scales: set[str] = field(default_factory=set[str])
    diagonal: dict[str, Gained] = field(default_factory=dict[str, Gained])
    mean: bool = False
    contracted: bool = False
