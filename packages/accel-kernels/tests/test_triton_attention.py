"""The Triton kernel of paged attention, run by Triton's interpreter on the CPU: the reference's results, and its own
bits whatever the batch. A GPU runs the same in test_gpu_inference.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import accel_kernels as ak, torch
from accel_kernels.backends.inference import triton_attention
from accel_kernels.dispatch import AttentionOptions
from inference_lab import agree
from test_paged_attention import make_batch

NAMES = ("window", "softcap", "alibi_slopes", "k_scale", "v_scale")
DEFAULTS = {"window": 0, "softcap": 0.0}

def run(tensors, options, enough=None):
    out = torch.full(tensors[0].shape, float("nan"), dtype=tensors[0].dtype)
    chosen = AttentionOptions(options["scale"], *(options.get(name, DEFAULTS.get(name)) for name in NAMES))
    triton_attention._ENOUGH_PROGRAMS = enough
    triton_attention.run(*tensors, chosen, out)
    return out

slopes = torch.tensor([0.5, 0.1, 0.02, 1.0])
RULES = [{}, {"window": 9}, {"softcap": 3.0}, {"alibi_slopes": slopes}, {"window": 70, "alibi_slopes": slopes}]
triton_attention.CHUNK = 64  # so that small batches have several
CASES = [(torch.float32, False, rule) for rule in RULES] + [(torch.float16, True, {}), (torch.float32, True, RULES[4])]
for dtype, int8, rule in CASES:
    batch = make_batch([(11, 33), (0, 5), (1, 150), (20, 70)], dtype=dtype, int8=int8, dim=24, **rule)
    whole = run(batch.tensors, batch.options, enough=0)
    agree(whole, batch.run("reference"), units=4.0, num_terms=300, at_least=1.0)
    assert torch.equal(run(batch.tensors, batch.options, enough=10**9), whole)  # chunks shared out
    q, k, v, tables, starts, context = batch.tensors
    alone = (q[5:9], k, v, tables[:1], torch.tensor([0, 4]).int(), torch.tensor([31]).int())
    assert torch.equal(run(alone, batch.options, enough=0), whole[5:9])
    alone = (q[11:12], k, v, tables[2:3], torch.tensor([0, 1]).int(), torch.tensor([150]).int())
    assert torch.equal(run(alone, batch.options, enough=10**9), whole[11:12])
print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environ
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"
