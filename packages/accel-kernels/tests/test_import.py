"""Importing is cheap, quiet and touches no device; nothing heavy is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_prints_nothing() -> None:
    assert run("import accel_kernels") == ""


def test_adds_little_to_torch() -> None:
    code = "import time, torch; start = time.perf_counter(); import accel_kernels; print(time.perf_counter() - start)"
    seconds = min(float(run(code)) for _ in range(5))
    assert seconds < 0.15


def test_loads_neither_numba_nor_cupy_nor_cuda() -> None:
    code = """
import sys, torch
import accel_kernels as ak
ak.grad_norm_scale(torch.ones(10))
print([m for m in ("numba", "cupy", "triton") if m in sys.modules], torch.cuda.is_initialized())
"""
    assert run(code).strip() == "[] False"


def test_one_openmp_runtime() -> None:
    """Two would each keep a pool of threads."""
    code = """
import accel_kernels as ak, torch
torch.ones(1 << 22).sum()
ak.grad_norm_scale(torch.ones(1 << 22))
try:
    lines = open("/proc/self/maps").read().split("\\n")
except OSError:
    lines = []
print(len({line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line}))
"""
    assert int(run(code)) <= 1
