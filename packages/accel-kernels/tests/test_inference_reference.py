"""The reference of the inference ops means what torch, or the formula, says."""

from __future__ import annotations

import accel_kernels as ak
import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_is_a_complex_product(dtype: torch.dtype, interleaved: bool) -> None:
    q, k = torch.randn(5, 3, 20).to(dtype), torch.randn(5, 2, 20).to(dtype)
    angles, positions = torch.rand(30, 8) * 6, torch.tensor([3, 29, 0, 7, 7])
    turned = [q.clone(), k.clone()]
    ak.reference.rotary(*turned, angles.cos(), angles.sin(), positions, interleaved=interleaved)
    turn = torch.polar(torch.ones(5, 1, 8), angles[positions].unsqueeze(1))
    for before, after in zip((q, k), turned, strict=True):
        pairs = [x[..., :16].float() for x in (before, after)]
        pairs = [x.unflatten(-1, (8, 2) if interleaved else (2, 8)) for x in pairs]
        pairs = pairs if interleaved else [x.transpose(-1, -2) for x in pairs]
        old, new = (torch.view_as_complex(x.contiguous()) for x in pairs)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(new, old * turn, rtol=tolerance, atol=tolerance)
        assert torch.equal(after[..., 16:], before[..., 16:])


def test_rms_norm_is_torchs() -> None:
    x, weight, residual = torch.randn(4, 33), torch.randn(33), torch.randn(4, 33)
    torch.testing.assert_close(ak.reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))
    both = x + residual
    got = ak.reference.rms_norm(x, weight, 1e-5, residual=residual, weight_offset=1.0)
    torch.testing.assert_close(got, F.rms_norm(both, (33,), weight + 1, 1e-5))
    assert torch.equal(residual, both)


def test_products_are_torchs() -> None:
    x, weight, bias = torch.randn(4, 64), torch.randn(6, 64), torch.randn(6)
    torch.testing.assert_close(ak.reference.linear(x, weight, bias), F.linear(x, weight, bias))
    quantized, scale = ak.quantize_int8(weight)
    expected = F.linear(x, quantized.float() * scale[:, None], bias)
    torch.testing.assert_close(ak.reference.linear_int8(x, quantized, scale, bias), expected)
    packed, scale, zero = ak.quantize_int4(weight, 32)
    dense = torch.empty(6, 64)
    for n in range(6):
        for i in range(64):
            q = int(packed[n, i // 2]) >> (4 * (i % 2)) & 15
            dense[n, i] = (q - int(zero[n, i // 32])) * scale[n, i // 32]
    got = ak.reference.linear_int4(x, packed, scale, zero, bias, group_size=32)
    torch.testing.assert_close(got, F.linear(x, dense, bias))


def test_gated_activations_are_torchs() -> None:
    gate_up = torch.randn(3, 22)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(ak.reference.silu_mul(gate_up), F.silu(gate) * up)
    torch.testing.assert_close(ak.reference.gelu_mul(gate_up), F.gelu(gate, approximate="tanh") * up)
