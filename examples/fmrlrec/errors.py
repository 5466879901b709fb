"""What can go wrong in the recommender, told so that a person can mend it."""

from __future__ import annotations

from matryoshkafy.errors import MatryoshkafyError


class DataError(MatryoshkafyError):
    """Interactions or items that cannot be read or that leave nothing to learn from."""


class ConfigError(MatryoshkafyError):
    """A setting that does not exist or does not fit."""


class RunError(MatryoshkafyError):
    """A run folder that lacks what a command needs, or that belongs to another configuration."""
