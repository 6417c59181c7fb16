"""Importing has no side effects: no CUDA context, no output, no global settings."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
threads = torch.get_num_threads()
import comm_compress
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
"""


def test_import_is_quiet() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
