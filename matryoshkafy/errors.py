"""Every error of the library: what was given, what was expected, what to do."""

from __future__ import annotations


class MatryoshkafyError(ValueError):
    """The base of every error that a user can mend."""
