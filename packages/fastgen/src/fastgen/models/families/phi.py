"""Phi-1, 1.5 and 2: parallel residual, part of each head rotated; Phi-3: Llama's blocks, products fused, LongRoPE."""

from __future__ import annotations

from typing import Any

from ..spec import DecoderSpec, Mlp, Norm, Placement
from ..weight_map import Joined, Table
from .family import Family, head_dim, layers
from .llama import BLOCK, base

_PHI: Table = {
    **BLOCK,
    "layers.{i}.attention.o": "layers.{i}.self_attn.dense",
    "layers.{i}.attention.q_norm": "layers.{i}.self_attn.q_layernorm",
    "layers.{i}.attention.k_norm": "layers.{i}.self_attn.k_layernorm",
    "layers.{i}.mlp.up": "layers.{i}.mlp.fc1",
    "layers.{i}.mlp.down": "layers.{i}.mlp.fc2",
    "norm": "final_layernorm",
}
_PHI3: Table = {
    **BLOCK,
    "layers.{i}.attention.qkv": Joined("layers.{i}.self_attn.qkv_proj"),
    "layers.{i}.mlp.up": Joined("layers.{i}.mlp.gate_up_proj"),
}


def _phi(config: Any, max_len: int | None) -> DecoderSpec:
    norm = Norm(config.layer_norm_eps, centered=True, bias=True)
    mlp = Mlp(config.intermediate_size, config.hidden_act, gated=False, bias=True)
    return base(
        config,
        max_len,
        norm=norm,
        final_norm=norm,
        layers=layers(config, mlp, head_dim(config) ** -0.5),
        placement=Placement.PARALLEL,
        shared_norm=True,
        qkv_bias=True,
        o_bias=True,
        qk_norm=norm if config.qk_layernorm else None,
        logits_bias=True,
    )


FAMILIES = [
    Family(("phi",), _phi, lambda config: _PHI),
    Family(("phi3",), base, lambda config: _PHI3),
]
