"""Gated activations: SwiGLU and its sibling with GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks_inference import FLOATS, expect, expect_written
from ..dispatch import choose_inference
from ..errors import AccelValueError


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """``silu(gate) * up`` in fp32, rounded once; a row holds the gate, then the up projection.

    Args:
        gate_up: ``[T, 2 F]``, fp32, bf16 or fp16; rows may lie apart.
        out: ``[T, F]`` of the same dtype; rows may lie apart; None makes one.
        backend: as in ``adam_step``.

    Returns:
        ``out``. Gradients are not recorded.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Shazeer, arXiv:2002.05202, equation 6.
    """
    return _gated("silu_mul", "silu", gate_up, out, backend)


def gelu_mul(gate_up: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """``gelu(gate) * up`` with the tanh approximation of GELU, as Gemma has it.

    Otherwise as ``silu_mul``.

    Source: Shazeer, arXiv:2002.05202, equation 6; Hendrycks & Gimpel, arXiv:1606.08415, section 2.
    """
    return _gated("gelu_mul", "gelu_tanh", gate_up, out, backend)


def _gated(op: str, activation: str, gate_up: Tensor, out: Tensor | None, backend: str | None) -> Tensor:
    expect(op, "gate_up", gate_up, FLOATS, (None, None))
    num_tokens, width = gate_up.shape
    if width % 2:
        raise AccelValueError(f"{op}: gate_up: expected an even number of columns, got {width}")
    if out is None:
        out = torch.empty(num_tokens, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    else:
        expect(op, "out", out, (gate_up.dtype,), (num_tokens, width // 2), gate_up.device)
        expect_written(op, "out", out)
    chosen = choose_inference(op, gate_up.device.type, gate_up.dtype, backend)
    if out.numel():
        chosen.gated(activation, gate_up, out)
    return out
