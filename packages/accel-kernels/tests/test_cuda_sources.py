"""The CUDA sources compile: every .cu with nvcc where that is, and as NVRTC will see them."""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import shutil
import site
import subprocess
from pathlib import Path

import pytest
from accel_kernels.backends import cuda

NAMES = sorted(path.name for path in cuda.SOURCES.glob("*.cu"))
STEPS = ("adam", "lion", "adagrad", "sgd")


def expressions(name: str) -> list[str]:
    stem = name.removesuffix(".cu")
    if stem in STEPS:
        return [f"{stem}_step<{grad}, {low}>" for grad in (0, 1, 2) for low in (1, 2, 3)]
    if stem == "norm":
        return [*(f"norm_partial<{grad}>" for grad in (0, 1, 2)), "norm_finish"]
    if stem == "blocks":
        forms = [f"{bits}, {symmetric}" for bits in (8, 4) for symmetric in ("false", "true")]
        ends = [f"{stochastic}, {team}" for stochastic in ("false", "true") for team in (32, 256)]
        return [
            *(f"quantize<{src}, {form}, {end}>" for src in (0, 1, 2) for form in forms for end in ends),
            *(f"requantize_sum<{bits}, {form}, {end}>" for bits in (8, 4) for form in forms for end in ends),
            *(f"dequantize_sum<{dst}, {form}>" for dst in (0, 1, 2) for form in forms),
        ]
    if stem == "signs":
        flags = [f"{a}, {b}" for a in ("false", "true") for b in ("false", "true")]
        return [
            *(f"sign_sums<{src}, {both}>" for src in (0, 1, 2) for both in flags),
            "sign_scale",
            *(f"pack_signs<{src}, {error}>" for src in (0, 1, 2) for error in ("false", "true")),
            *(f"mean_signs<{dst}>" for dst in (0, 1, 2)),
        ]
    if stem == "rms_norm":
        return [f"rms_norm<{t}, {w}>" for t, w in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 2))]
    if stem == "rotary":
        return [f"rotary<{t}>" for t in (0, 1, 2)]
    if stem in ("gated", "write_kv"):
        return [f"{stem}<{t}, {flag}>" for t in (0, 1, 2) for flag in ("false", "true")]
    return [f"cast_copy<{s}, {d}, {r}>" for s in (0, 1, 2) for d in (0, 1, 2) for r in ("true", "false")]


def test_all_sources_are_there() -> None:
    inference = ["gated.cu", "rms_norm.cu", "rotary.cu", "write_kv.cu"]
    expected = sorted(
        [*(f"{stem}.cu" for stem in STEPS), "cast.cu", "norm.cu", "blocks.cu", "signs.cu", *inference]
    )
    assert expected == NAMES


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_nvcc(name: str, arch: str, tmp_path: Path) -> None:
    command = ["nvcc", *cuda.OPTIONS, f"-arch={arch}", "-Werror", "all-warnings", "-cubin", "-o"]
    run = subprocess.run(
        [*command, str(tmp_path / "out.cubin"), str(cuda.SOURCES / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out.cubin").stat().st_size > 0


@pytest.mark.parametrize("name", NAMES)
def test_headers_are_written_out(name: str) -> None:
    text = cuda.load_source(name)
    assert "#include" not in text
    assert "#pragma once" not in text
    assert text.count("enum { F32 = 0") == 1
    assert expressions(name)[0].split("<")[0].split("_")[0] in text


def nvrtc() -> ctypes.CDLL | None:
    found = ctypes.util.find_library("nvrtc")
    patterns = [f"{folder}/nvidia/*/lib/libnvrtc.so.*" for folder in site.getsitepackages()]
    candidates = [found] if found else []
    candidates += sorted(
        file for pattern in patterns for file in glob.glob(pattern) if "builtins" not in file
    )
    return ctypes.CDLL(candidates[0]) if candidates else None


@pytest.mark.skipif(nvrtc() is None, reason="libnvrtc is not here")
@pytest.mark.parametrize("name", NAMES)
def test_nvrtc(name: str) -> None:
    library = nvrtc()
    assert library is not None
    program = ctypes.c_void_p()
    source = cuda.load_source(name).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None) == 0
    for expression in expressions(name):
        assert library.nvrtcAddNameExpression(program, expression.encode()) == 0
    options = [option.encode() for option in (*cuda.OPTIONS, "--gpu-architecture=compute_80")]
    result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert result == 0, log.value.decode()
    for expression in expressions(name):
        lowered = ctypes.c_char_p()
        assert library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(lowered)) == 0
    library.nvrtcDestroyProgram(ctypes.byref(program))
