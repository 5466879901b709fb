"""What every reader of models returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RANDOM = "random"


@dataclass(frozen=True)
class Loaded:
    """A model and inputs that fit its forward; `weights` says where they were loaded from, that
    they are random, or nothing where the user's code made them.
    """

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str = ""

    @property
    def trained(self) -> bool:
        """Whether trained weights were loaded."""
        return self.weights not in ("", RANDOM)

    def nesting(self, asked: str | None, scope: str) -> str | None:
        """Return the nesting: what was loaded keeps its function unless the user says otherwise."""
        return "sliced" if asked is None and self.trained and scope != "output" else asked
