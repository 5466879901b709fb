"""Counts, bytes and times as a person says them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(value: float) -> str:
    """Return a count as a person says it: 912, 3.4K, 110M."""
    return _scaled(value, ("", "K", "M", "G", "T", "P"))


def stored(value: float) -> str:
    """Return bytes as a person says them: 912 B, 3.4 kB, 438 MB (powers of 1000)."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def timed(seconds: float) -> str:
    """Return a time as a person says it: 850 us, 12.3 ms, 1.13 s, 3 min 20 s."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if seconds < (59.5 if unit == "s" else 999.5 * size):
            return f"{seconds / size:.3g} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}{units[-1]}"
