"""What a family states, and what configs of several families have in common: rotary angles, windows, ALiBi."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...errors import ModelError
from ..spec import Attention, DecoderSpec, Experts, Layer, Mlp, Rotary
from ..weight_map import Table


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        model_types: of the configs that it takes.
        spec: (config, longest sequence or None for the config's) to a spec.
        table: (config) to where the weights are, without prefixes.
        prefixes: of tensor names, which checkpoints may or may not have; the first that fits is cut.
        ignored: regular expressions of tensors that hold no weights.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Any, int | None], DecoderSpec]
    table: Callable[[Any], Table]
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)


def head_dim(config: Any) -> int:
    """Of a config that may or may not state it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary(
    config: Any, dim: int, max_len: int | None, *, layer_type: str | None = None, interleaved: bool = False
) -> Rotary:
    """A config's rotary embedding; scaled ones by transformers' own functions.

    Args:
        config: of the model.
        dim: elements of a head that are rotated, before the config's `partial_rotary_factor`.
        max_len: longest sequence; angles that depend on the length (dynamic NTK) are made for it.
        layer_type: where the config has parameters for each.
        interleaved: see `Rotary`.
    """
    parameters = _rope_parameters(config, layer_type)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in ("default", None):
        rotated = int(
            dim * parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)
        )
        exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        return Rotary(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), interleaved)
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ModelError(f"rope_type: expected one of {sorted(ROPE_INIT_FUNCTIONS)}, got {kind!r}")
    by_type: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}

    def made(seq_len: int | None) -> tuple[tuple[float, ...], float]:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len, **by_type)
        return tuple(inv_freq.float().tolist()), float(factor)

    if kind != "longrope":
        inv_freq, factor = made(max_len if kind == "dynamic" else None)
        return Rotary(inv_freq, interleaved, factor)
    original = parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
    short, factor = made(None)
    long, _ = made(original + 1)
    return Rotary(short, interleaved, factor, long, original)


def _rope_parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:  # transformers 4
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        return {"rope_theta": getattr(config, "rope_theta", 10000.0), **scaling}
    return dict(parameters if layer_type is None else parameters[layer_type])


def windows(config: Any) -> list[int]:
    """Each layer's sliding window; 0: none."""
    window = int(getattr(config, "sliding_window", None) or 0)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ModelError(f"layer_types: expected sliding_attention or full_attention, got {sorted(unknown)}")
    return [window if each == "sliding_attention" else 0 for each in types]


def layers(
    config: Any, mlp: Mlp | Experts | list[Mlp | Experts], scale: float, *, rotary: int | None = 0
) -> tuple[Layer, ...]:
    """Blocks that differ at most in their windows and MLPs."""
    count = config.num_hidden_layers
    mlps = mlp if isinstance(mlp, list) else [mlp] * count
    return tuple(
        Layer(Attention(scale, window, rotary), own)
        for window, own in zip(windows(config), mlps, strict=True)
    )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Press et al., arXiv:2108.12409: powers of 2^(-8/n); where n is no power of two, more of those of 2n."""
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / whole) for h in range(num_heads - whole)]
    return tuple(slopes)
