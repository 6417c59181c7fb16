"""Experts' products in one call give what one expert after another gives."""

from __future__ import annotations

import pytest
import torch
from fastgen.linear import LinearPolicy
from fastgen.models.moe import MoeLayer
from fastgen.models.spec import Experts, Mlp
from fastgen.parallel import TensorParallel
from torch.nn import functional as F


def _layer(num_experts: int, top_k: int) -> MoeLayer:
    torch.manual_seed(0)
    policy = LinearPolicy(torch.bfloat16, torch.device("cpu"))
    layer = MoeLayer(Experts(num_experts, top_k, Mlp(32, "silu")), 64, policy, TensorParallel())
    linears = [layer.router, *(part for expert in layer.experts for part in (expert.up, expert.down))]
    for linear in linears:
        linear.load(torch.randn(linear.shard.shape, dtype=torch.bfloat16) * 0.2, None)
    return layer


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_tokens"), [(8, 2, 30), (8, 2, 1), (4, 4, 5), (64, 1, 9), (8, 2, 0)]
)
def test_grouped_equals_one_by_one(num_experts: int, top_k: int, num_tokens: int) -> None:
    layer = _layer(num_experts, top_k)
    x = torch.randn(num_tokens, 64, dtype=torch.bfloat16)
    wanted = layer(x, {})
    layer.grouped = True
    layer.finish()
    assert layer.experts[1].up.weight.data_ptr() == layer.stacked_up[1].data_ptr()  # no second copy
    torch.testing.assert_close(layer(x, {}), wanted, rtol=2e-2, atol=2e-2)
    assert num_tokens == 0 or float(wanted.abs().max()) > 0.1
