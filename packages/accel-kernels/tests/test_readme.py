"""The README's examples run as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def run_example(number: int) -> str:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[number]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_kernels() -> None:
    assert "adam_step" in run_example(0)


def test_codecs() -> None:
    assert run_example(1) == "400004 bytes as 51565 or 12505\n"


def test_transfers() -> None:
    assert any(name in run_example(2) for name in ("io_uring", "threads", "portable"))


def test_inference() -> None:
    run_example(3)
