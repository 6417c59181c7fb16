"""Gemma 1, 2 and 3 (text): scaled embeddings, norms that hold a difference from one, windows, soft caps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement
from ..weight_map import Table
from .family import Family, head_dim, layers, rotary, windows
from .llama import BLOCK, base

_SANDWICH: Table = {
    **BLOCK,
    "layers.{i}.norm2": "layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.norm3": "layers.{i}.post_attention_layernorm",
    "layers.{i}.norm4": "layers.{i}.post_feedforward_layernorm",
}
_VISION = (r"vision_tower\.", r"multi_modal_projector\.")


def _text(config: Any) -> Any:
    """The text part of a config that may also describe images."""
    return getattr(config, "text_config", config)


def _mlp(config: Any) -> Mlp:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return Mlp(config.intermediate_size, activation)


def _gemma(config: Any, max_len: int | None, **changes: Any) -> DecoderSpec:
    norm = Norm(config.rms_norm_eps, offset=1.0)
    if "layers" not in changes:
        changes["layers"] = layers(config, _mlp(config), head_dim(config) ** -0.5)
    return base(config, max_len, norm=norm, final_norm=norm, embed_scale=config.hidden_size**0.5, **changes)


def _sandwich(config: Any, max_len: int | None, **changes: Any) -> DecoderSpec:
    return _gemma(
        config,
        max_len,
        placement=Placement.SANDWICH,
        softcap=config.attn_logit_softcapping or 0.0,
        logits_softcap=config.final_logit_softcapping or 0.0,
        **changes,
    )


def _gemma2(config: Any, max_len: int | None) -> DecoderSpec:
    return _sandwich(config, max_len, layers=layers(config, _mlp(config), config.query_pre_attn_scalar**-0.5))


def _gemma3(config: Any, max_len: int | None) -> DecoderSpec:
    """Layers with a window turn by other angles than those without."""
    config = _text(config)
    dim = head_dim(config)
    scale = config.query_pre_attn_scalar**-0.5
    spec = _sandwich(
        config,
        max_len,
        layers=tuple(
            Layer(Attention(scale, window, int(kind == "sliding_attention")), _mlp(config))
            for kind, window in zip(config.layer_types, windows(config), strict=True)
        ),
        rotaries=_gemma3_rotaries(config, dim, max_len),
    )
    return replace(spec, qk_norm=spec.norm)


def _gemma3_rotaries(config: Any, dim: int, max_len: int | None) -> tuple[Any, ...]:
    if getattr(config, "rope_parameters", None) is None:  # transformers 4
        from copy import copy

        local = copy(config)
        local.rope_theta, local.rope_scaling = config.rope_local_base_freq, None
        return rotary(config, dim, max_len), rotary(local, dim, max_len)
    kinds = ("full_attention", "sliding_attention")
    return tuple(rotary(config, dim, max_len, layer_type=kind) for kind in kinds)


FAMILIES = [
    Family(("gemma",), _gemma, lambda config: BLOCK),
    Family(("gemma2",), _gemma2, lambda config: _SANDWICH),
    Family(("gemma3_text",), _gemma3, lambda config: _SANDWICH),
    Family(
        ("gemma3",),
        _gemma3,
        lambda config: _SANDWICH,
        prefixes=("language_model.model.", "model.language_model.", "language_model.", "model."),
        ignored=_VISION,
    ),
]
