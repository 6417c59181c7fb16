"""The source distribution builds a wheel by itself, the wheel holds what it needs, and no compiler is no obstacle."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None
            for name in ("build", "scikit_build_core", "pybind11", "ninja")
        ),
        reason="needs build, scikit-build-core, pybind11 and ninja",
    ),
]
CUDA = {"adam.cu", "lion.cu", "adagrad.cu", "sgd.cu", "norm.cu", "cast.cu", "common.cuh", "step.cuh"}


def build(out: Path, *arguments: str, **environment: str) -> list[str]:
    """Files of the one wheel that ``python -m build`` leaves in ``out``; by default it is built from the sdist."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(out),
        *arguments,
        str(PACKAGE),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [wheel.name, *archive.namelist()]


def test_wheel_from_sdist(tmp_path: Path) -> None:
    wheel = build(tmp_path, ACCEL_KERNELS_REQUIRE_CPP="1")
    assert any(name.startswith("accel_kernels/_cpu.") and not name.endswith(".pyi") for name in wheel)
    assert {f"accel_kernels/csrc/cuda/{name}" for name in CUDA} <= set(wheel)
    assert "accel_kernels/py.typed" in wheel
    assert not any("csrc/cpu" in name for name in wheel)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    assert members["src/accel_kernels/csrc/cpu/module.cpp"].isfile()
    assert members["src/accel_kernels/csrc/cuda/adam.cu"].isfile()
    assert not any(member.issym() for member in members.values())


def test_without_a_compiler(tmp_path: Path) -> None:
    wheel = build(tmp_path, "--wheel", CXX="/nowhere/c++")
    assert wheel[0].endswith("-py3-none-any.whl")
    assert not any(name.startswith("accel_kernels/_cpu.cpython") for name in wheel)
    assert {f"accel_kernels/csrc/cuda/{name}" for name in CUDA} <= set(wheel)
