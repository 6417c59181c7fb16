"""Qwen 2, 2.5 and 3, and their mixtures of experts."""

from __future__ import annotations

from typing import Any

from ..spec import DecoderSpec, Experts, Mlp, Norm
from ..weight_map import Stacked, Table
from .family import Family, head_dim, layers
from .llama import BLOCK, base

_MOE: Table = {
    **BLOCK,
    "layers.{i}.mlp.router": "layers.{i}.mlp.gate",
    "layers.{i}.mlp.experts.{e}.up": [
        ("layers.{i}.mlp.experts.{e}.gate_proj", "layers.{i}.mlp.experts.{e}.up_proj"),
        Stacked("layers.{i}.mlp.experts.gate_up_proj"),
    ],
    "layers.{i}.mlp.experts.{e}.down": [
        "layers.{i}.mlp.experts.{e}.down_proj",
        Stacked("layers.{i}.mlp.experts.down_proj"),
    ],
    "layers.{i}.mlp.shared.up": (
        "layers.{i}.mlp.shared_expert.gate_proj",
        "layers.{i}.mlp.shared_expert.up_proj",
    ),
    "layers.{i}.mlp.shared.down": "layers.{i}.mlp.shared_expert.down_proj",
    "layers.{i}.mlp.shared_gate": "layers.{i}.mlp.shared_expert_gate",
}


def _qwen2(config: Any, max_len: int | None) -> DecoderSpec:
    return base(config, max_len, qkv_bias=True)


def _qwen3(config: Any, max_len: int | None) -> DecoderSpec:
    return base(config, max_len, qk_norm=Norm(config.rms_norm_eps))


def _mlps(config: Any, experts: Experts) -> list[Mlp | Experts]:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not exclude."""
    dense = Mlp(config.intermediate_size, config.hidden_act)
    excluded, step = config.mlp_only_layers or [], config.decoder_sparse_step
    return [
        experts if i not in excluded and config.num_experts > 0 and (i + 1) % step == 0 else dense
        for i in range(config.num_hidden_layers)
    ]


def _qwen2_moe(config: Any, max_len: int | None) -> DecoderSpec:
    experts = Experts(
        config.num_experts,
        config.num_experts_per_tok,
        Mlp(config.moe_intermediate_size, config.hidden_act),
        normalized=config.norm_topk_prob,
        shared=Mlp(config.shared_expert_intermediate_size, config.hidden_act),
        shared_gated=True,
    )
    own = layers(config, _mlps(config, experts), head_dim(config) ** -0.5)
    return base(config, max_len, qkv_bias=getattr(config, "qkv_bias", True), layers=own)


def _qwen3_moe(config: Any, max_len: int | None) -> DecoderSpec:
    experts = Experts(
        config.num_experts,
        config.num_experts_per_tok,
        Mlp(config.moe_intermediate_size, config.hidden_act),
        normalized=config.norm_topk_prob,
    )
    own = layers(config, _mlps(config, experts), head_dim(config) ** -0.5)
    return base(config, max_len, qk_norm=Norm(config.rms_norm_eps), layers=own)


FAMILIES = [
    Family(("qwen2",), _qwen2, lambda config: BLOCK),
    Family(("qwen3",), _qwen3, lambda config: BLOCK),
    Family(("qwen2_moe",), _qwen2_moe, lambda config: _MOE),
    Family(("qwen3_moe",), _qwen3_moe, lambda config: _MOE),
]
