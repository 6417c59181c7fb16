"""report() tells which back end runs and why, and an installation without the extension works."""

from __future__ import annotations

import subprocess
import sys

import accel_kernels as ak
import pytest
import torch

OPS = {
    *("adam_step", "lion_step", "adagrad_step", "sgd_step", "grad_norm_scale", "cast_copy"),
    *("quantize_blocks", "dequantize_blocks", "dequantize_sum", "requantize_sum"),
    *("pack_signs", "unpack_signs", "mean_signs"),
    *("paged_attention", "write_kv", "linear", "linear_int8", "linear_int4"),
    *("rms_norm", "rotary", "silu_mul", "gelu_mul"),
}


def test_covers_every_op() -> None:
    report = ak.report()
    assert set(report) == OPS
    assert all(set(by_device) == {"cpu", "cuda", "other"} for by_device in report.values())
    assert all(op in str(report) for op in OPS)


@pytest.mark.skipif(not ak.available_cpu_isas(), reason="the C++ back end is not built")
def test_names_instruction_set_and_threads() -> None:
    choice = ak.report()["adam_step"]["cpu"]
    assert choice.backend == "cpu"
    assert f"{torch.get_num_threads()} thread" in choice.why
    with ak.set_cpu_isa("baseline"):
        assert "baseline" in str(ak.report())


def test_says_which_transfer_engine_runs() -> None:
    report = ak.report()
    with ak.TransferEngine() as engine:
        assert (report.transfers.backend, report.transfers.why) == (engine.name, engine.why)
    assert str(report).splitlines()[-1] == f"transfers  {report.transfers}"


def test_says_why_there_is_no_cuda() -> None:
    choice = ak.report()["adam_step"]["cuda"]
    if not torch.cuda.is_available():
        assert choice.backend is None
        assert "CUDA" in choice.why


WITHOUT = """
import sys
{block}
import torch
import accel_kernels as ak
from accel_kernels import reference
assert ak.available_cpu_isas() == ()
print(ak.report())
tensors = [torch.rand(1000) for _ in range(4)]
others = [t.clone() for t in tensors]
segments = [ak.AdamSegment(start=1, stop=999, lr=0.1, step=3)]
ak.adam_step(*tensors, segments)
reference.adam_step(*others, segments)
assert all(torch.equal(a, b) for a, b in zip(tensors, others))
half = torch.empty(1000, dtype=torch.float16)
ak.cast_copy(tensors[0], half)
ak.grad_norm_scale(half)
try:
    ak.adam_step(*tensors, segments, backend="cpu")
except ak.BackendUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("numba", [True, False])
def test_without_the_extension(numba: bool) -> None:
    block = "sys.modules['accel_kernels._cpu'] = None"
    if not numba:
        block += """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
"""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(block=block)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "portable" in run.stdout
    assert "extension not built" in run.stdout
    if not numba:
        assert "numba is not installed" in run.stdout
