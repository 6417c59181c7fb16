"""Every benchmark still runs, in its quick mode."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import dev
import pytest
import torch

# The engines that say most in least time; the peers of their own environment are not part of the tests.
FEWER = {
    "train_step": [
        "--engines",
        "ddp,fsdp2,zero-core-3",
        "--dtypes",
        "bf16",
        "--accumulate",
        "2",
        "--recompute",
    ]
}


# Three seeds of each method, even in few steps.
SLOW = {"compression_learning", "zenflow_learning"}


def marked(name: str) -> Any:
    """A benchmark, which may be left out of the default run."""
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize("name", [marked(name) for name in dev.benchmark_names()])
def test_quick_mode_prints_a_table(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", *FEWER.get(name, [])]
    result = subprocess.run(command, cwd=dev.REPO, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "|" in result.stdout


@pytest.mark.parametrize("name", dev.benchmark_names("net_"))
def test_a_network_benchmark_runs_or_says_what_it_needs(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick"]
    result = subprocess.run(command, cwd=dev.REPO, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode == 2:
        assert re.search("need root|install iproute2|not permitted|not supported", result.stderr)
    else:
        assert result.returncode == 0, result.stderr
        assert "| zero-core-3-messages |" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", dev.benchmark_names("gpu_"))
def test_a_gpu_benchmark_says_what_it_needs(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick"]
    result = subprocess.run(command, cwd=dev.REPO, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, "needs a CUDA device" in result.stdout) == (2, True)
