"""The CUDA kernels of the inference ops agree with the reference, and a row's bits do not depend on its batch."""

from __future__ import annotations

import importlib.util
from typing import Any

import accel_kernels as ak
import pytest
import torch
from inference_lab import FLOATS, agree
from test_paged_attention import RULES, SHAPES, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }


@needs_triton
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
def test_attention(rule: str, shape: str, dtype: torch.dtype, int8: bool) -> None:
    batch = make_batch(SHAPES[shape], dtype=dtype, int8=int8, dim=64, **RULES[rule])
    tensors, options = [tensor.cuda() for tensor in batch.tensors], on_gpu(batch.options)
    whole = ak.paged_attention(*tensors, backend="cuda", **options)
    agree(whole.cpu(), batch.run("reference"), units=4.0, num_terms=300, at_least=1.0)
    q, k_cache, v_cache, tables, starts, _ = tensors
    for s, (queries, keys) in enumerate(SHAPES[shape]):
        if queries == 0:
            continue
        last = int(starts[s + 1]) - 1
        alone = (q[last : last + 1], k_cache, v_cache, tables[s : s + 1])
        lengths = [torch.tensor(value, dtype=torch.int32, device="cuda") for value in ([0, 1], [keys])]
        got = ak.paged_attention(*alone, *lengths, backend="cuda", **options)
        assert torch.equal(got[0], whole[last])


@needs_cupy
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
def test_write_kv(dtype: torch.dtype, int8: bool) -> None:
    fused, slots = torch.randn(9, 6, 37).to(dtype), torch.randperm(20)[:9]
    slots[4] = -1
    outcomes = []
    for device, backend in (("cuda", "cuda"), ("cpu", "reference")):
        caches = [
            torch.full((5, 3, 4, 37), 7.0).to(torch.int8 if int8 else dtype).to(device) for _ in range(2)
        ]
        scales = [torch.full((5, 3, 4), 7.0, device=device) if int8 else None for _ in range(2)]
        new = fused.to(device)
        rest = {"k_scale": scales[0], "v_scale": scales[1], "backend": backend}
        ak.write_kv(new[:, :3], new[:, 3:], *caches, slots.to(device), **rest)
        outcomes.append([*caches, *(scale for scale in scales if scale is not None)])
    for got, expected in zip(*outcomes, strict=True):
        assert torch.equal(got.cpu(), expected)


@needs_cupy
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_ops(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(7, 3, 300).to(dtype), torch.randn(7, 3, 300).to(dtype), torch.randn(300)
    mine = residual.cuda()
    got = ak.rms_norm(x.cuda(), weight.cuda(), 1e-5, residual=mine, weight_offset=1.0, backend="cuda")
    agree(got.cpu(), ak.reference.rms_norm(x, weight, 1e-5, residual=residual, weight_offset=1.0))
    assert torch.equal(mine.cpu(), residual)
    flat = torch.randn(5, 602).to(dtype)
    for op in ("silu_mul", "gelu_mul"):
        agree(
            getattr(ak, op)(flat.cuda(), backend="cuda").cpu(), getattr(ak.reference, op)(flat), at_least=10.0
        )
    angles, positions = torch.rand(20, 40), torch.tensor([3, 19, 0, 4, 4, 1, 2])
    for interleaved in (False, True):
        turned = x.cuda()
        tables = (angles.cos(), angles.sin(), positions)
        on_device = [tensor.cuda() for tensor in tables]
        ak.rotary(turned[:, :2], turned[:, 2:], *on_device, interleaved=interleaved, backend="cuda")
        expected = x.clone()
        ak.reference.rotary(expected, None, *tables, interleaved=interleaved)
        agree(turned.cpu(), expected)


@needs_triton
def test_attention_can_be_captured() -> None:
    batch = make_batch([(1, 2000), (1, 30)], dtype=torch.float16, dim=64)
    tensors, options = [tensor.cuda() for tensor in batch.tensors], on_gpu(batch.options)
    out = torch.empty(tensors[0].shape, dtype=torch.float16, device="cuda")
    ak.paged_attention(*tensors, out=out, backend="cuda", **options)  # compiles
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ak.paged_attention(*tensors, out=out, backend="cuda", **options)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
