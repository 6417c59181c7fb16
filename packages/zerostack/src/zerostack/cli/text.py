"""Words for a person at a terminal."""

from __future__ import annotations

import argparse
import math
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
        argparse.ArgumentTypeError: For anything else; as a parser's `type` it makes the message.
    """
    factors = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    factor = factors.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if factor != 1.0 else text) * factor
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number such as 7.5e9, 350M or 1.3B, got {text!r}")
    return value
