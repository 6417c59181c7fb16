"""The two hosts of `tools/slow_network.py`, for benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

from slow_network import Lab, LabError, lab

__all__ = ["Lab", "LabError", "lab"]
