"""Every error of the library: what was given, what was expected, what to do."""

from __future__ import annotations

LONGEST = 300


def first_line(error: object) -> str:
    """Return the first line of what an error says, for the message of another; "" if nothing."""
    return (str(error).strip().splitlines() or [""])[0][:LONGEST]


class MatryoshkafyError(ValueError):
    """The base of every error that a user can mend."""


class TraceError(MatryoshkafyError):
    """The model cannot be traced, or is called in another way than it was traced."""


class GuardError(TraceError):
    """A call has inputs of other sizes or kinds than the trace is right for."""


class PlanError(MatryoshkafyError):
    """What was asked for does not fit the model's plan."""


class NothingNests(MatryoshkafyError):
    """The model has no width that could nest."""
