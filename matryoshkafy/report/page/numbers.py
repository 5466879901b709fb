"""Counts, bytes and times as a person says them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(value: float) -> str:
    """Return a count as a person says it: 1.2M."""
    return _scaled(value, 1000, ("", "K", "M", "G", "T", "P"), "")


def stored(value: float) -> str:
    """Return bytes as a person says them: 1.2 MB (powers of 1000)."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB"), " ")


def timed(seconds: float) -> str:
    """Return a time as a person says it: 12.3 ms, 1.13 s."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _scaled(value: float, base: int, units: Sequence[str], space: str) -> str:
    for unit in units[:-1]:
        if abs(value) < base * 0.9995:
            return (
                f"{value:.3g}{space}{unit}" if value != int(value) else f"{value:.0f}{space}{unit}"
            )
        value /= base
    return f"{value:.3g}{space}{units[-1]}"
