"""Mixtral: Llama's blocks with experts."""

from __future__ import annotations

from typing import Any

from ..spec import DecoderSpec, Experts, Mlp
from ..weight_map import Stacked, Table
from .family import Family, head_dim, layers
from .llama import BLOCK, base

_TABLE: Table = {
    **BLOCK,
    "layers.{i}.mlp.router": ["layers.{i}.block_sparse_moe.gate", "layers.{i}.mlp.gate"],
    "layers.{i}.mlp.experts.{e}.up": [
        ("layers.{i}.block_sparse_moe.experts.{e}.w1", "layers.{i}.block_sparse_moe.experts.{e}.w3"),
        Stacked("layers.{i}.mlp.experts.gate_up_proj"),
    ],
    "layers.{i}.mlp.experts.{e}.down": [
        "layers.{i}.block_sparse_moe.experts.{e}.w2",
        Stacked("layers.{i}.mlp.experts.down_proj"),
    ],
}


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    mlp = Mlp(config.intermediate_size, config.hidden_act)
    experts = Experts(config.num_local_experts, config.num_experts_per_tok, mlp)
    return base(config, max_len, layers=layers(config, experts, head_dim(config) ** -0.5))


FAMILIES = [Family(("mixtral",), _spec, lambda config: _TABLE)]
