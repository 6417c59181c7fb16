"""GPT-J: parallel residual behind one norm, neighbours of each head rotated as pairs."""

from __future__ import annotations

from typing import Any

import torch

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement, Rotary
from ..weight_map import Table
from .family import Family

_BASE = 10000.0
_TABLE: Table = {
    "embed": "wte",
    "layers.{i}.norm1": "h.{i}.ln_1",
    "layers.{i}.attention.qkv": tuple(f"h.{{i}}.attn.{each}_proj" for each in "qkv"),
    "layers.{i}.attention.o": "h.{i}.attn.out_proj",
    "layers.{i}.mlp.up": "h.{i}.mlp.fc_in",
    "layers.{i}.mlp.down": "h.{i}.mlp.fc_out",
    "norm": "ln_f",
    "lm_head": "lm_head",
}
_MASKS = (r"attn\.bias$", r"attn\.masked_bias$")


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    dim = config.n_embd // config.n_head
    rotated = config.rotary_dim or dim
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    norm = Norm(config.layer_norm_epsilon, centered=True, bias=True)
    mlp = Mlp(config.n_inner or 4 * config.n_embd, config.activation_function, gated=False, bias=True)
    return DecoderSpec(
        vocab_size=config.vocab_size,
        width=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=dim,
        layers=(Layer(Attention(dim**-0.5), mlp),) * config.n_layer,
        norm=norm,
        placement=Placement.PARALLEL,
        final_norm=norm,
        max_len=config.n_positions,
        shared_norm=True,
        rotaries=(Rotary(tuple((1.0 / _BASE**exponents).tolist()), interleaved=True),),
        tied=config.tie_word_embeddings,
        logits_bias=True,
    )


FAMILIES = [Family(("gptj",), _spec, lambda config: _TABLE, prefixes=("transformer.",), ignored=_MASKS)]
