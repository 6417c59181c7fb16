"""Words for a person at a terminal."""

from __future__ import annotations

import sys


def say(text: str = "") -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def parse_count(text: str) -> float:
    """A number such as `7.5e9`, `350M` or `1.3B`.

    Raises:
        ValueError: For anything else.
    """
    factors = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    factor = factors.get(text[-1:].upper(), 1.0)
    value = float(text[:-1] if factor != 1.0 else text) * factor
    if not value > 0:
        raise ValueError(f"expected a number above 0, got {text!r}")
    return value
