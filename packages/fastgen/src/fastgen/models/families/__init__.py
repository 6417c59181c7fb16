"""Families of decoders: for each, how a config becomes a `DecoderSpec` and where its weights are in a checkpoint.

One file a family (or a few that differ little). `FAMILIES` is the register, by the config's `model_type`.
"""

from __future__ import annotations

from . import bloom, falcon, gemma, gpt2, gpt_neox, gptj, llama, mixtral, opt, phi, qwen
from .family import Family

FAMILIES: dict[str, Family] = {
    model_type: family
    for module in (bloom, falcon, gemma, gpt2, gpt_neox, gptj, llama, mixtral, opt, phi, qwen)
    for family in module.FAMILIES
    for model_type in family.model_types
}

__all__ = ["FAMILIES", "Family"]
